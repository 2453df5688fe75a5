"""A pool child that died in the middle of a merge: its parent sees that at once, and ends the attempt then.

Without this the lease would have to run out. Where the parent dies too, or its database is away, it still does.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[import-untyped]
from billiard.exceptions import WorkerLostError  # type: ignore[import-untyped]
from celery.utils.dispatch import Signal
from celery.worker.request import Request

from app import logs
from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.job import Status
from app.records.jobs import Jobs

log = logging.getLogger("mergeyard.deaths")

STOP_SECONDS = 3.0  # a worker that ends waits this long for what is still to be written
PAUSE_SECONDS = 1.0
KILLED = "signal 9"

child_died = Signal(name="child_died", providing_args={"death"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A child, by its process id, that had the job's doorbell. ``status`` is billiard's: "signal 9 (SIGKILL)"."""

    job_id: str
    pid: int
    status: str

    @property
    def reason(self) -> str:
        """As in ``transitions.LOST``."""
        return "child_killed" if KILLED in self.status else "child_died"


class MergeRequest(Request):  # type: ignore[misc]
    """What Celery's worker knows of a doorbell while a child answers it (the documented ``Task.Request``)."""

    def on_failure(self, exc_info: Any, *arguments: Any, **options: Any) -> Any:
        """The child raised, or died. Celery's own lines about that have the merge's id, like all others."""
        return copy_context().run(self._on_failure, exc_info, *arguments, **options)

    def _on_failure(self, exc_info: Any, *arguments: Any, **options: Any) -> Any:
        job_id = str(self.args[0])
        logs.about(merge=job_id)
        error = exc_info.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        # A child that makes room for a fresh one (``tasks.leave``) has closed its row, and exits with 0.
        if isinstance(error, WorkerLostError) and "exitcode 0" not in str(error) and self.worker_pid:
            child_died.send(sender=self, death=Death(job_id=job_id, pid=self.worker_pid, status=str(error)))
        return super().on_failure(exc_info, *arguments, **options)


class Undertaker:
    """Ends the attempts of children that died, in a thread: the worker's event loop must not wait for a database.

    ``worker`` is the worker's name, as in its children's claims. ``seconds`` is a lease: after that the janitor has
    ended the attempt.
    """

    def __init__(self, jobs: Jobs, bell: Bell, *, worker: str, seconds: float) -> None:
        self._jobs, self._bell, self._worker, self._seconds = jobs, bell, worker, seconds
        self._deaths: queue.Queue[Death | None] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="undertaker", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        child_died.connect(self._hear)

    def stop(self) -> None:
        """End, after what was heard of; where the database is away, without."""
        child_died.disconnect(self._hear)
        self._stopping.set()
        self._deaths.put(None)
        self._thread.join(STOP_SECONDS)

    def bury(self, death: Death) -> None:
        """End the attempt, if the child had one and had not ended it by itself, and ring where the job may go on."""
        job = self._jobs.lose(death.job_id, worker=self._worker, process=death.pid, reason=death.reason)
        if job is not None:
            logs.of_job(log, job).warning("the merge's process died (%s): %s", death.status, job.status)
        # Without one it may have died with the doorbell in its hand, before it claimed.
        now = job or self._jobs.get(death.job_id, kind=None)
        if now.status is Status.QUEUED and now.retry_at is None:
            self._bell.ring(now.id, now.queue, now.priority)

    def _hear(self, death: Death, **_: Any) -> None:
        self._deaths.put(death)

    def _run(self) -> None:
        while (death := self._deaths.get()) is not None:
            deadline = time.monotonic() + self._seconds
            while not self._buried(death) and time.monotonic() < deadline:
                if self._stopping.wait(PAUSE_SECONDS):
                    return

    def _buried(self, death: Death) -> bool:
        try:
            self.bury(death)
        except MergeyardError as error:
            log.warning("the end of an attempt is not written yet: %s", error, extra={"merge": death.job_id})
            return error.code != "database_unavailable"  # without a broker the janitor rings
        except Exception:
            log.exception("the janitor will have to end an attempt", extra={"merge": death.job_id})
        return True
