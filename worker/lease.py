"""The lease of one claimed job: kept alive by a thread, and asked by the engine at every block whether to go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from app import logs
from app.errors import MergeyardError
from app.records.job import CancelRequested, Job, LeaseLost
from app.records.jobs import Jobs
from app.tasks.task import TaskScore

log = logging.getLogger("mergeyard.lease")

Written = TypeVar("Written")

BEAT_SECONDS = 3.0  # a beat is also how a cancel is heard, which must not wait for a quarter of a long lease
PROGRESS_SECONDS = 0.5  # the row's progress moves at most this often
HANG_SECONDS = 15.0  # how long a merge that was told to stop may take to reach its next check


class Stopping(Exception):  # noqa: N818 — news, not an error
    """The worker was told to stop; the job goes back to the queue."""


@dataclass(slots=True)
class StopRequest:
    """Whether this process was told to stop. A plain flag: signal handlers may take no locks."""

    made: bool = False


class Lease:
    """A Control (``worker.engine.stream``) of the claimed ``job``. Use as a context manager around the work.

    ``check`` raises LeaseLost, CancelRequested or Stopping. Where the merge does not come to its next check within
    HANG_SECONDS of that, ``abandon`` ends the process: a hung merge must not hold a worker for ever.
    """

    def __init__(
        self,
        jobs: Jobs,
        job: Job,
        *,
        seconds: float,
        stop: StopRequest,
        abandon: Callable[[int], None] = os._exit,
    ) -> None:
        assert job.lease_token is not None
        self.job_id, self.token = job.id, job.lease_token
        self._jobs, self._seconds, self._stop, self._abandon = jobs, seconds, stop, abandon
        self._log = logs.of_job(log, job)
        self._lost = self._cancel = False
        self._progress: tuple[int, int] | None = None
        self._written: tuple[int, int] | None = None
        self._last_beat = time.monotonic()
        self._told_at: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    # ── what the engine calls ────────────────────────────────────────────────────────────────────

    def stage(self, name: str) -> None:
        """The engine enters a stage."""
        self.check()
        self.persist(lambda: self._jobs.set_stage(self.job_id, self.token, name))

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """Only noted; the thread writes it."""
        self._progress = (bytes_done, bytes_total)

    def scored(self, score: TaskScore) -> None:
        """The result was scored on a task."""
        self.persist(lambda: self._jobs.record_score(self.job_id, self.token, score))

    def check(self) -> None:
        """Raise what ends this attempt, if anything does."""
        if self._over():
            raise LeaseLost(self.job_id)
        if self._cancel:
            raise CancelRequested(self.job_id)
        if self._stop.made:
            raise Stopping(self.job_id)

    def persist(self, write: Callable[[], Written]) -> Written:
        """A write that the attempt depends on. A database that is away is waited for as long as the lease may last."""
        while True:
            try:
                return write()
            except MergeyardError as error:
                if error.code != "database_unavailable" or self._over():
                    raise
                self._log.warning("%s", error)
                time.sleep(0.5)

    # ── the thread ───────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        every = min(BEAT_SECONDS, self._seconds / 4)
        while not self._done.wait(min(PROGRESS_SECONDS, every)):
            due = time.monotonic() - self._last_beat >= every
            if not self._over() and (due or self._progress != self._written):
                self._beat()
            self._watch_for_hanging()

    def _beat(self) -> None:
        began, progress = time.monotonic(), self._progress
        done, total = progress or (None, None)
        try:
            beat = self._jobs.heartbeat(
                self.job_id, self.token, lease_seconds=self._seconds, progress_bytes=done, total_bytes=total
            )
        except LeaseLost:
            self._lost = True
        except Exception as error:  # the thread must outlive whatever a database can raise
            self._log.warning("heartbeat failed: %s", error)
            # By the database's clock the lease is over, and somebody may hold it by now.
            self._lost = time.monotonic() - self._last_beat > self._seconds
        else:
            self._cancel = self._cancel or beat.cancel_requested
            self._last_beat, self._written = began, progress

    def _over(self) -> bool:
        """Whether another attempt may own the job by now.

        The thread may be waiting for a database that does not answer, so it is not asked: a lease that was not
        prolonged for twice its length is over. (Once is not enough: a beat that is only late finds out by itself.)
        """
        if time.monotonic() - self._last_beat > 2 * self._seconds:
            self._lost = True
        return self._lost

    def _watch_for_hanging(self) -> None:
        if not (self._over() or self._cancel or self._stop.made):
            return
        if self._told_at is None:
            self._told_at = time.monotonic()
        elif time.monotonic() - self._told_at > HANG_SECONDS:
            self._log.error("the merge does not stop; ending its process")
            try:
                if self._cancel and not self._lost:
                    self._jobs.confirm_cancelled(self.job_id, self.token)
                elif self._stop.made and not self._lost:
                    self._jobs.hand_back(self.job_id, self.token)
            finally:
                self._abandon(1)
