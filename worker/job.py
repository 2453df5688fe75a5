"""One job, from the claim to the publication, and every way it can end instead."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

from app import logs
from app.artifacts.manifest import StoredFile
from app.artifacts.opening import open_store
from app.artifacts.store import ArtifactStore
from app.errors import NO_SPACE, MergeyardError
from app.planning.plan import Plan
from app.planning.planner import plan_again
from app.planning.reuse import changeable_files, reuse_key
from app.records.bell import Bell
from app.records.database import Database
from app.records.janitor import sweep
from app.records.job import CancelRequested, Job, Kind, LeaseLost, NoRoom, Stage
from app.records.jobs import Jobs
from app.records.owned import resolver_of
from app.records.points import Points
from app.records.upkeep import Upkeep
from app.records.workers import Workers
from app.settings import Settings
from app.sources.buckets import Buckets
from app.sources.fetching.stored import from_store
from app.sources.fetching.transfer import Transfer
from app.sources.hub.hub import Hub, HubSettings
from app.sources.resolver import Resolver
from app.sources.source import RemoteFile
from app.tasks.task import TaskScore
from worker.engine.digests import DigestCache
from worker.engine.kernels import Kernels, load, warm_up
from worker.engine.run import build_manifest, run_merge, write_manifest
from worker.evaluation.evaluate import evaluator
from worker.lease import Lease, Stopping, StopRequest
from worker.points import Scoring
from worker.sink import StoreSink

log = logging.getLogger("mergeyard.job")


class Ending(StrEnum):
    """How an attempt ended in this process."""

    NOT_OURS = "not_ours"  # the doorbell rang twice, or the job was cancelled meanwhile
    NO_ROOM = "no_room"  # nothing was begun: the job waits until the store has room for it
    PUBLISHED = "published"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"
    FAILED = "failed"  # the attempt; the job may be retried
    LOST = "lost"  # somebody else owns the job


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """What one worker process works with: made once, and kept warm between jobs."""

    settings: Settings
    jobs: Jobs
    bell: Bell
    hub: Hub
    store: ArtifactStore
    kernels: Kernels
    digests: DigestCache
    worker: str  # its name, for the events


def open_workplace(settings: Settings, worker: str) -> Workplace:
    """Open the database and compile the kernels, so that the first job does not pay for it. ``worker``: its name."""
    kernels = load(settings.device)
    warm_up(kernels)
    database = Database(settings.database, answer_seconds=settings.database_seconds)
    _tell_device(database, worker, kernels)
    store = open_store(settings)
    _sweep_scratch(store, database)
    return Workplace(
        settings=settings,
        jobs=Jobs(database, retry_seconds=settings.retry_seconds),
        bell=Bell(settings.broker),
        hub=Hub(HubSettings.of(settings)),
        store=store,
        kernels=kernels,
        digests=DigestCache(settings.digests),
        worker=worker,
    )


def _sweep_scratch(store: ArtifactStore, database: Database) -> None:
    """What died here with its process, of jobs that nobody works on any more: other hosts' janitors cannot reach it."""
    upkeep = Upkeep(database)
    try:
        for job_id in store.scratched():
            claims = upkeep.claims(job_id)
            if claims is None or claims.writing is None:
                store.delete_scratch(job_id)
    except (MergeyardError, OSError) as error:
        log.warning("what was left of earlier work stays: %s", error)


def _tell_device(database: Database, worker: str, kernels: Kernels) -> None:
    device = torch.cuda.get_device_name() if kernels.name == "cuda" else ""
    try:
        Workers(database).set_device(worker, f"{kernels.name}: {device}" if device else kernels.name)
    except MergeyardError as error:  # people will not see it; the work is the same
        log.warning("the worker's device is not told: %s", error)


def work(place: Workplace, job_id: str, stop: StopRequest) -> Ending:
    """Answer the doorbell: claim the job, merge, publish. Every ending is in the row before this returns.

    The one exception is a database that stays away: then the lease runs out, and the janitor decides.
    """
    try:
        job = place.jobs.claim(
            job_id,
            lease_seconds=place.settings.lease_seconds,
            worker=place.worker,
            process=os.getpid(),
            free=place.store.free,
        )
    except NoRoom as lacking:
        log.warning("waits for room: %s", lacking, extra={"merge": job_id})
        place.jobs.wait_for_disk(job_id, lacking, pause=place.settings.room_seconds)
        return Ending.NO_ROOM
    if job is None:
        log.info("nothing to do: taken, finished or cancelled", extra={"merge": job_id})
        return Ending.NOT_OURS
    line = logs.of_job(log, job)
    line.info("claimed, attempt %d of %d", job.attempt, job.max_attempts)
    with Lease(place.jobs, job, seconds=place.settings.lease_seconds, stop=stop) as lease:
        ending = _attempt(place, job, lease, line)
    _tidy(place, job, line)
    if ending is Ending.HANDED_BACK:
        _ring(place, job, line)
    line.info("%s", ending)
    return ending


def _attempt(place: Workplace, job: Job, lease: Lease, line: logging.LoggerAdapter[logging.Logger]) -> Ending:
    jobs, token = place.jobs, lease.token
    try:
        try:
            if job.kind is Kind.MERGE:
                artifact, key = _merge(place, job, lease)
                lease.persist(lambda: jobs.publish(job.id, token, artifact, reuse_key=key))
            else:
                _scoring(place, job, lease).run(job, lease)
                lease.persist(lambda: jobs.conclude(job.id, token))
            return Ending.PUBLISHED
        except CancelRequested:
            lease.persist(lambda: jobs.confirm_cancelled(job.id, token))
            return Ending.CANCELLED
        except Stopping:
            lease.persist(lambda: jobs.hand_back(job.id, token))
            return Ending.HANDED_BACK
        except LeaseLost:
            raise
        except Exception as caught:
            error = _user_facing(caught)
            # The trace is for the worker's log; the row and the user get the error's own words.
            line.error("%s: %s", error.code, error.message, exc_info=None if error.fault == "user" else caught)
            lease.persist(lambda: jobs.fail(job.id, token, error, retry=error.fault == "system"))
            return Ending.FAILED
    except LeaseLost:
        line.warning("the lease is lost: another attempt owns the job")
        return Ending.LOST
    except MergeyardError as error:
        line.error("the ending could not be written, the lease will run out: %s", error)
        return Ending.LOST


def _merge(place: Workplace, job: Job, lease: Lease) -> tuple[Mapping[str, Any], str | None]:
    """The straight line: plan again, fetch what is on the hub, merge, write the manifest.

    The artifact's row value and reuse key come back.
    """
    plan = _plan_here(place, job, lease, job.resolved, job.plan_digest, lease.progress)
    key = reuse_key(plan)
    lease.check()
    sink = lease.persist(lambda: StoreSink(place.store, place.jobs, job, lease.persist))
    output = run_merge(
        plan,
        sink,
        kernels=place.kernels,
        threads=place.settings.threads,
        control=lease,
        digests=place.digests,
        evaluate=evaluator(plan, place.kernels.name),
    )
    manifest = write_manifest(build_manifest(plan, output), sink)
    lease.check()
    files = (*output.files, manifest)
    return artifact_row(manifest, files, output.evaluation), key if _reusable(plan, key, job, files) else None


def _scoring(place: Workplace, job: Job, lease: Lease) -> Scoring:
    return Scoring(
        points=Points(place.jobs.database),
        plan=lambda resolved, digest: _plan_here(place, job, lease, resolved, digest, lambda *_: None),
        resolver=lambda: _resolver(place, job),
        kernels=place.kernels,
        threads=place.settings.threads,
    )


def _resolver(place: Workplace, job: Job) -> Resolver:
    return resolver_of(job.owner, settings=place.settings, jobs=place.jobs, store=place.store, hub=place.hub)


def _transfer(place: Workplace, remote: Sequence[RemoteFile]) -> Transfer:
    """What brings those files here that are where the first one is."""
    origin = remote[0].origin
    wanted = [file for file in remote if file.origin == origin]
    match origin:
        case "hub":
            return place.hub.transfer(wanted)
        case "store":
            return from_store(place.store, place.settings).transfer(wanted)
        case "bucket":  # one after another: each has connections of its own
            first = [file for file in wanted if file.repository == remote[0].repository]
            return Buckets.of(place.settings).transfer(first)


def _reusable(plan: Plan, key: str | None, job: Job, files: Sequence[StoredFile]) -> bool:
    """Whether all of it was made from the files as ``key`` knows them: nothing was replaced meanwhile.

    What an earlier attempt made it made from files that this one did not see.
    """
    of_this_attempt = all(file.key.startswith(f"{job.id}/{job.lease_token}/") for file in files)
    return key == reuse_key(plan) and (of_this_attempt or not changeable_files(plan))


def _plan_here(
    place: Workplace,
    job: Job,
    lease: Lease,
    resolved: Mapping[str, Any],
    digest: str,
    on_progress: Callable[[int, int], None],
) -> Plan:
    """The plan of a resolved recipe of the job, made from the files as they are now, all of them on this machine.

    ``on_progress`` is told of the bytes that are fetched. Raises ``source_changed`` unless the plan is the one that
    was submitted, which had this digest.
    """

    def plan_now() -> Plan:
        return plan_again(resolved, digest, _resolver(place, job), what=job.kind)

    while (plan := lease.persist(plan_now)).remote:
        lease.stage(Stage.DOWNLOADING)
        _transfer(place, plan.remote).run(on_progress, lease.check)
    return plan


def artifact_row(
    manifest: StoredFile, files: tuple[StoredFile, ...], evaluation: Sequence[TaskScore] = ()
) -> dict[str, Any]:
    """The form of ``Job.artifact``; ``files`` include the manifest."""
    return {
        "manifest_sha256": manifest.sha256,
        "manifest_key": manifest.key,
        "size": sum(file.size for file in files),
        "files": [asdict(file) for file in files],
        **({"evaluation": [asdict(score) for score in evaluation]} if evaluation else {}),
    }


def _user_facing(error: Exception) -> MergeyardError:
    """Any failure as one with a code. What nobody foresaw is ``internal`` and tells nothing of the inside."""
    if isinstance(error, MergeyardError):
        return error
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return MergeyardError("disk_full", "The artifact store has no room left; free some space and merge again.")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MergeyardError("out_of_memory", "The worker has too little memory for this merge.")
    return MergeyardError(
        "internal", "The worker met an error it did not expect; its log has the details under this merge's id."
    )


def _tidy(place: Workplace, job: Job, line: logging.LoggerAdapter[logging.Logger]) -> None:
    """Delete what this attempt left in the store, but for what a retry can use or the artifact names.

    The row is read again and not assumed: a lost lease may hide that our own publication went through, or that the
    merge ended and was deleted. Whoever deleted it swept before our last file was written, so all of it goes here.
    """
    try:
        upkeep = Upkeep(place.jobs.database)
        claims = upkeep.claims(job.id)
        if claims is None or claims.finished:
            sweep(job.id, place.store, upkeep)
        else:
            recorded = {shard.file.key for shard in place.jobs.shards(job.id)}
            place.store.delete_prefix(f"{job.id}/{job.lease_token}", keep=recorded)
    except (MergeyardError, OSError) as error:
        line.warning("leftovers stay until the janitor sweeps them: %s", error)


def _ring(place: Workplace, job: Job, line: logging.LoggerAdapter[logging.Logger]) -> None:
    """Another worker may take a handed-back job at once. Retries are left to the janitor: its pause is theirs."""
    try:
        place.bell.ring(job.id, job.queue, job.priority)
    except MergeyardError as error:
        line.warning("the janitor will have to ring: %s", error)
