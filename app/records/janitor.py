"""The janitor: what makes an accepted merge end, whatever died on its way. One thread in every API process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import islice

from app.artifacts.store import ArtifactStore
from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.job import JanitorReport, Job
from app.records.jobs import Jobs
from app.records.quotas import Quotas
from app.records.tally import Tally
from app.records.upkeep import BATCH, Upkeep
from app.records.workers import Workers
from app.sources.uploads import UploadStore

RECOUNT_SECONDS = 600.0  # between two looks whether the sums of reservations are right

log = logging.getLogger("mergeyard.janitor")


class Janitor:
    """Every ``interval`` seconds: free what dead workers hold, ring for what waits, sweep what is left over.

    Any number may run at once. Each also counts events for the metrics, and forgets workers that are long lost.
    ``store`` None leaves the merges' files alone, ``uploads`` None the uploads'. A job that its worker keeps alive
    without moving it for ``stalled_after`` seconds is taken away, too.
    """

    def __init__(
        self,
        jobs: Jobs,
        bell: Bell,
        interval: float,
        store: ArtifactStore | None = None,
        uploads: UploadStore | None = None,
        *,
        stalled_after: float = 3600.0,
    ) -> None:
        self._upkeep = Upkeep(jobs.database, retry_seconds=jobs.retry_seconds)
        self._tally = Tally(jobs.database)
        self._quotas = Quotas(jobs.database)
        self._recounted = -RECOUNT_SECONDS
        self._workers = Workers(jobs.database)
        self._bell = bell
        self._interval = interval
        self._store = store
        self._uploads = uploads
        self._stalled_after = stalled_after
        self._lap: Iterator[str] = iter(())
        self._swept_up_to: Job | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self) -> None:
        """Begin; the first round is at once."""
        self._thread.start()

    def stop(self) -> None:
        """End after the round in progress."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def round(self) -> JanitorReport:
        """One round. A broker that is away costs the rings only: the rows wait for a later round."""
        report = self._upkeep.round(ring_after=self._interval, stalled_after=self._stalled_after)
        for event, ids in (
            ("worker lost, requeued", report.requeued),
            ("worker lost, failed", report.failed),
            ("worker lost, cancelled", report.cancelled),
        ):
            for job_id in ids:
                log.warning(event, extra={"merge": job_id})
        try:
            self._ring(report)
        finally:
            self._expire()
            self._sweep()
            self._tally.count()
            self._recount()
            self._workers.forget()
        return report

    def _run(self) -> None:
        while True:
            try:
                self.round()
            except MergeyardError as error:  # the database or the broker is away: the next round tries again
                log.warning("round cut short: %s", error)
            except Exception:
                log.exception("round failed")
            if self._stopping.wait(self._interval):
                return

    def _ring(self, report: JanitorReport) -> None:
        """Ring, but never so often that more doorbells than jobs wait: a long queue must not fill the broker with
        repeats. Whose doorbell is missing nobody can tell; the urgent ones come first.
        """
        for queue in {ring.queue for ring in report.ring}:
            missing = self._upkeep.waiting(queue) - self._bell.waiting(queue)
            in_queue = sorted((ring for ring in report.ring if ring.queue == queue), key=lambda ring: -ring.priority)
            for ring in in_queue[: max(0, missing)]:
                self._bell.ring(ring.id, ring.queue, ring.priority)

    def _recount(self) -> None:
        if time.monotonic() - self._recounted < RECOUNT_SECONDS:
            return
        self._recounted = time.monotonic()
        if self._quotas.recount():
            log.error("what merges reserve was not the sum of their rows; it is now")

    def _expire(self) -> None:
        for job in self._upkeep.expire():
            log.info("expired", extra={"merge": job.id})

    def _sweep(self) -> None:
        if self._uploads is not None:
            self._uploads.sweep()
        if self._store is None:
            return
        try:
            self._sweep_finished(self._store)
            self._sweep_strays(self._store)
            self._store.empty_trash()
        except MergeyardError as error:
            if error.code != "store_unavailable":
                raise
            log.warning("leftovers stay, a later round tries again: %s", error)  # the rest of the round does not wait

    def _sweep_finished(self, store: ArtifactStore) -> None:
        found = self._upkeep.unswept(after=self._swept_up_to)
        for job in found:
            try:
                sweep(job.id, store, self._upkeep)
            except OSError as error:  # a folder that cannot be deleted is nobody else's concern
                log.warning("leftovers stay, a later round tries again: %s", error, extra={"merge": job.id})
        # What stays is passed by, so that a whole batch of it does not hide the jobs behind it either.
        self._swept_up_to = found[-1] if len(found) >= BATCH else None

    def _sweep_strays(self, store: ArtifactStore) -> None:
        """Go over the whole store, a few folders a round: after its job was swept, an attempt that had lost it may have
        written, and died before it could clean up.
        """
        folders = list(islice(self._lap, BATCH))
        if not folders:
            self._lap = store.folders()
        for job_id in folders:
            try:
                sweep_strays(job_id, store, self._upkeep)
            except OSError as error:
                log.warning("strays stay, a later lap tries again: %s", error, extra={"merge": job_id})


def sweep(job_id: str, store: ArtifactStore, upkeep: Upkeep) -> None:
    """Delete the files of a job that has finished, but for those of an artifact that somebody refers to."""
    claims = upkeep.claims(job_id)
    store.delete_prefix(job_id, keep=frozenset() if claims is None else claims.keys)
    upkeep.set_swept(job_id)


def sweep_strays(job_id: str, store: ArtifactStore, upkeep: Upkeep) -> None:
    """Delete what no row accounts for below the job's folder.

    A folder of a job that is not in the records at all is left alone: the store may be another database's.
    """
    keys = list(store.keys(job_id))  # before the row is read: what an attempt begins after that is not in the list
    claims = upkeep.claims(job_id)
    if claims is None:
        log.warning("the store holds a folder of no merge in these records; it is left alone", extra={"merge": job_id})
        return
    strays = [key for key in keys if key not in claims.keys and key.split("/")[1] != claims.writing]
    if claims.finished and (strays or not keys):
        store.delete_prefix(job_id, keep=claims.keys)  # empty folders, too: nobody makes files in them any more
        return
    for key in strays:
        store.delete(key)
