"""What one running API holds: its records, queue and stores, made when it starts and handed to every endpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from app.api.callers import Callers
from app.api.failures import Failures
from app.api.figures import Figures
from app.api.limits import RateLimits
from app.api.readiness import Readiness
from app.api.streams import Streams
from app.api.turns import Turns
from app.artifacts.manifest import StoredFile
from app.artifacts.store import ArtifactStore
from app.errors import MergeyardError
from app.records.aliases import Aliases
from app.records.audit import Audit
from app.records.bell import Bell
from app.records.database import Database
from app.records.deliveries import Deliveries
from app.records.janitor import sweep
from app.records.job import Job, NewJob
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.keys import Keys
from app.records.owned import OwnedUploads, resolver_of
from app.records.points import Points
from app.records.published import artifact_files
from app.records.queues import Queues
from app.records.quotas import Limits, Quotas
from app.records.sessions import Sessions
from app.records.upkeep import Upkeep
from app.records.workers import Workers
from app.settings import Settings
from app.sources.hub.hub import Hub
from app.sources.resolver import Resolver
from app.sources.source import FoundFiles
from app.sources.uploads import UploadStore
from app.webhooks.outbound import Allowed

log = logging.getLogger("mergeyard.api")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Everything an endpoint works with. Safe to share between threads."""

    settings: Settings
    database: Database
    jobs: Jobs
    points: Points
    queues: Queues
    workers: Workers
    aliases: Aliases
    bell: Bell
    hub: Hub
    store: ArtifactStore
    uploads: UploadStore
    uploaded: OwnedUploads
    quotas: Quotas
    planning: Turns
    keys: Keys
    sessions: Sessions
    audit: Audit
    callers: Callers
    limits: RateLimits
    failures: Failures
    readiness: Readiness
    figures: Figures
    streams: Streams
    webhook_hosts: Allowed
    deliveries: Deliveries

    def resolver(self, owner: str, merges: set[str] | None = None) -> Resolver:
        """Where the references of this owner's recipes lead. The ids of merges that it finds go into ``merges``."""
        found = resolver_of(owner, settings=self.settings, jobs=self.jobs, store=self.store, hub=self.hub)
        if merges is None or (find := found.merges) is None:
            return found

        def noting(job_id: str) -> FoundFiles:
            files = find(job_id)
            merges.add(job_id)
            return files

        return replace(found, merges=noting)

    def reusable(self, new: NewJob) -> str | None:
        """The artifact (``Job.artifact_id``) that is the new job's result already, and whole in the store."""
        maker = self.jobs.reusable(new)
        if maker is None:
            return None
        try:
            whole = all(self.store.size(file.key) == file.size for file in artifact_files(maker).values())
        except OSError:
            whole = False
        if not whole:
            log.warning("the files of this merge are damaged: it is not reused", extra={"merge": maker.id})
        return maker.id if whole else None

    def limits_of(self, caller: Caller) -> Limits:
        """What may be added for the caller."""
        every_owner = self.settings.quota_bytes_per_owner
        return Limits(
            owner_bytes=every_owner if caller.quota_bytes is None else caller.quota_bytes,
            owner_jobs=self.settings.max_jobs_per_owner,
            store_bytes=self.settings.quota_bytes,
            free=self.store.free,
        )

    def published(self, job_id: str, by: Caller) -> tuple[Job, Mapping[str, StoredFile]]:
        """A merge and its files by name, the manifest first. Raises `not_found`; `conflict` when it has none."""
        job = self.jobs.get(job_id, by=by)
        if job.artifact is None:
            raise _nothing_published(job)
        return job, artifact_files(job)

    def discard(self, job: Job) -> None:
        """Delete a deleted merge's files now, as far as nobody shares them. What fails here, the janitor does later."""
        for folder in {job.id, job.artifact_id or job.id}:
            try:
                sweep(folder, self.store, Upkeep(self.database))
            except OSError:
                log.exception("the files of %s could not be deleted; the janitor will try again", folder)
            except MergeyardError as error:
                if error.code != "store_unavailable":
                    raise
                log.warning("the files of %s stay until the janitor deletes them: %s", folder, error)

    def ring(self, job: Job) -> None:
        """Tell the workers. A broker that is away costs time and nothing else: the row waits for the janitor's ring."""
        try:
            self.bell.ring(job.id, job.queue, job.priority)
        except MergeyardError as error:
            log.warning("%s waits for the janitor's ring: %s", job.id, error.message)


def service(request: Request) -> Service:
    """The running API's Service, as a dependency."""
    held = request.app.state.service
    assert isinstance(held, Service)
    return held


Serving = Annotated[Service, Depends(service)]


def _nothing_published(job: Job) -> MergeyardError:
    if job.status.finished:
        return MergeyardError("conflict", f"The merge {job.status} and has no files; GET /merges/{job.id} says why.")
    return MergeyardError("conflict", f"The merge is {job.status}: poll GET /merges/{job.id} until it has succeeded.")
