"""A worker that went deaf: connected to its broker by all appearances, and hearing no doorbell.

It happens after a broker's connection dies without a word (celery #8030, #8091, #10302), and no error ever comes. What
it cannot hide is that jobs wait while the worker idles; then the worker ends, and whoever watches it starts another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.upkeep import Upkeep

log = logging.getLogger("mergeyard.worker")


class DeafnessWatch:
    """Calls ``leave`` once the worker has idled and heard nothing for ``seconds`` while jobs of ``queue`` waited.

    ``busy``: whether the worker holds a job, or a doorbell for its child. ``heard``: how many doorbells it has heard
    so far; some come to nothing, as those of jobs that the store has no room for. A broker that does not answer is no
    deafness: Celery waits for it as long as it takes.
    """

    def __init__(
        self,
        upkeep: Upkeep,
        bell: Bell,
        *,
        queue: str,
        seconds: float,
        busy: Callable[[], bool],
        heard: Callable[[], int],
        leave: Callable[[], None],
    ) -> None:
        self._upkeep, self._bell, self._queue = upkeep, bell, queue
        self._seconds, self._busy, self._heard, self._leave = seconds, busy, heard, leave
        self._heard_before = 0
        self._idle_since: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deafness", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting."""
        self._stopping.set()

    def deaf(self, now: float) -> bool:
        """Look once, at ``now`` (seconds of any steady clock)."""
        heard, before = self._heard(), self._heard_before
        self._heard_before = heard
        if heard != before or self._busy() or not self._jobs_wait():
            self._idle_since = None
            return False
        if self._idle_since is None:
            self._idle_since = now
        return now - self._idle_since >= self._seconds

    def _jobs_wait(self) -> bool:
        try:
            if self._upkeep.waiting(self._queue) == 0:
                return False
            self._bell.check()
        except MergeyardError as error:
            log.warning("cannot see whether jobs wait: %s", error)
            return False
        return True

    def _run(self) -> None:
        while not self._stopping.wait(min(5.0, self._seconds / 4)):
            if self.deaf(time.monotonic()):
                log.critical("jobs have waited for %g s while this worker heard nothing: it ends", self._seconds)
                self._leave()
                return
