"""Failed authentications, counted in the audit. Whoever guesses must not fill the database with the traces of it."""

from __future__ import annotations

import logging
import threading
import time

from app.errors import MergeyardError
from app.records.audit import Audit
from app.records.key import KEY_TEXT, Caller

ROWS_A_MINUTE = 10  # of each API process

log = logging.getLogger("mergeyard.api")


class Failures:
    """Writes a row a failure, and of more than ``ROWS_A_MINUTE`` how many there were, with the next row."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._lock = threading.Lock()
        self._minute = 0
        self._rows = 0
        self._unwritten = 0

    def note(self, code: str, text: str, *, address: str | None, request_id: str) -> None:
        """A request came with a key or a session (``text``) that opens nothing. Never raises."""
        with self._lock:
            if (minute := int(time.monotonic() // 60)) != self._minute:
                self._minute, self._rows = minute, 0
            self._rows += 1
            if self._rows > ROWS_A_MINUTE:
                self._unwritten += 1
                return
            unwritten, self._unwritten = self._unwritten, 0
        claimed = KEY_TEXT.fullmatch(text)
        by = Caller(owner="", key_id=claimed[1] if claimed else None, scopes=frozenset(), request_id=request_id)
        self._write(by, {"code": code, "address": address or "", "count": 1 + unwritten})

    def flush(self) -> None:
        """Write what is counted and not written: the process ends."""
        with self._lock:
            unwritten, self._unwritten = self._unwritten, 0
        if unwritten:
            self._write(Caller(owner="", scopes=frozenset()), {"code": "", "address": "", "count": unwritten})

    def _write(self, by: Caller, data: dict[str, object]) -> None:
        try:
            self._audit.add(by, "authentication_failed", data=data)
        except MergeyardError as error:
            log.warning("%s failed authentications are not in the audit: %s", data["count"], error.message)
