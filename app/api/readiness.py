"""Which parts of the service can work: what /readyz answers, and /metrics tells."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.database import Database


class Readiness:
    """Looks at the database (reachable, and migrated to this version), the broker, and the artifact store's folder."""

    def __init__(self, database: Database, bell: Bell, store: Path) -> None:
        self._checks = {"database": database.check, "queue": bell.check, "store": self._check_store}
        self._store = store

    def look(self) -> Mapping[str, MergeyardError | None]:
        """By part, what keeps it from working; None where nothing does. A part that is away takes seconds."""
        found: dict[str, MergeyardError | None] = {}
        for part, check in self._checks.items():
            try:
                check()
                found[part] = None
            except MergeyardError as error:
                found[part] = error
        return found

    def _check_store(self) -> None:
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._store):  # nameless: no kill can leave it behind
                pass
        except OSError as error:
            message = f"The artifact store cannot be written to: {error.strerror}."
            raise MergeyardError("not_ready", message) from None
