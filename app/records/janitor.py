"""The janitor: what makes an accepted merge end, whatever died on its way. One thread in every API process."""

from __future__ import annotations

import logging
import threading

from app.artifacts.store import ArtifactStore
from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.job import JanitorReport, Job
from app.records.jobs import Jobs
from app.records.upkeep import BATCH, Upkeep
from app.sources.uploads import UploadStore

log = logging.getLogger("mergeyard.janitor")


class Janitor:
    """Every ``interval`` seconds: free what dead workers hold, ring for what waits, sweep what is left over.

    Any number may run at once. ``store`` None leaves the merges' files alone, ``uploads`` None the uploads'.
    """

    def __init__(
        self,
        jobs: Jobs,
        bell: Bell,
        interval: float,
        store: ArtifactStore | None = None,
        uploads: UploadStore | None = None,
    ) -> None:
        self._upkeep = Upkeep(jobs.database)
        self._bell = bell
        self._interval = interval
        self._store = store
        self._uploads = uploads
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
        report = self._upkeep.round(ring_after=self._interval)
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
            self._sweep()
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
        """Ring, but only where fewer doorbells than jobs wait: a long queue must not fill the broker with repeats."""
        for queue in {ring.queue for ring in report.ring}:
            missing = self._upkeep.waiting(queue) - self._bell.waiting(queue)
            for ring in [ring for ring in report.ring if ring.queue == queue] if missing > 0 else []:
                self._bell.ring(ring.id, ring.queue, ring.priority)

    def _sweep(self) -> None:
        if self._uploads is not None:
            self._uploads.sweep()
        if self._store is None:
            return
        found = self._upkeep.unswept(after=self._swept_up_to)
        for job, deleted in found:
            try:
                sweep(job, self._store, deleted=deleted)
            except OSError as error:  # a folder that cannot be deleted is nobody else's concern
                log.warning("leftovers stay, a later round tries again: %s", error, extra={"merge": job.id})
            else:
                self._upkeep.set_swept(job.id)
        # What stays is passed by, so that a whole batch of it does not hide the jobs behind it either.
        self._swept_up_to = found[-1][0] if len(found) >= BATCH else None


def sweep(job: Job, store: ArtifactStore, *, deleted: bool = False) -> None:
    """Delete the job's files but for those its artifact names; all of them where it was ``deleted``."""
    artifact = {} if deleted or job.artifact is None else job.artifact
    keep = {file["key"] for file in artifact.get("files", [])} | {artifact.get("manifest_key", "")} - {""}
    store.delete_prefix(job.id, keep=keep)
