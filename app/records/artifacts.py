"""Published artifacts as counted references: jobs with the same result share one, and with the last of them it goes.

Whoever refers to an artifact, or ceases to, holds its row's lock: of a submission that would reuse it and a deletion of
the only job that had it, one comes first and the other sees what it did. Locks are taken in one order: the jobs that
are read, the job itself, its artifact.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, Select, delete, exists, insert, select, update

from app.errors import MergeyardError
from app.records import aliases, quotas, rows
from app.records.job import Job
from app.records.tables import artifacts, jobs, merge_sources


def add(connection: Connection, job: Job, now: datetime, reuse_key: str | None) -> None:
    """What the job has published in this transaction, referred to by the job alone."""
    connection.execute(insert(artifacts).values(id=job.id, owner=job.owner, reuse_key=reuse_key, published_at=now))
    quotas.account(connection, job.owner, quotas.Taken(artifacts=job.artifact_bytes))


def reusable(connection: Connection, owner: str, reuse_key: str) -> Job | None:
    """The job (it may be deleted) that made the owner's newest artifact of this key."""
    newest = (
        select(artifacts.c.id)
        .where(artifacts.c.owner == owner, artifacts.c.reuse_key == reuse_key)
        .order_by(artifacts.c.published_at.desc(), artifacts.c.id.desc())
        .limit(1)
    )
    row = connection.execute(_maker(newest.scalar_subquery())).one_or_none()
    return None if row is None else rows.read_job(row)


def hold(connection: Connection, made_by: str, owner: str) -> Job | None:
    """The job that made the artifact, which stays until the transaction ends; None where it is gone or another's."""
    mine = select(artifacts.c.id).where(artifacts.c.id == made_by, artifacts.c.owner == owner)
    if connection.scalar(mine.with_for_update()) is None:
        return None
    return rows.read_job(connection.execute(_maker(made_by)).one())


def release(connection: Connection, job: Job) -> None:
    """The job, as it was before its deletion, refers to its artifact no longer. The last one leaves it to the sweep."""
    if job.artifact_id is None:
        return
    connection.execute(select(artifacts.c.id).where(artifacts.c.id == job.artifact_id).with_for_update())
    if not connection.scalar(select(exists().where(jobs.c.artifact_id == job.artifact_id))):
        connection.execute(delete(artifacts).where(artifacts.c.id == job.artifact_id))
        connection.execute(update(jobs).where(jobs.c.id == job.artifact_id).values(swept=False))
        quotas.account(connection, job.owner, quotas.Taken(artifacts=-job.artifact_bytes))


def lock_read(connection: Connection, merges: Collection[str]) -> None:
    """Lock the merges that a new job reads. ``source_not_found`` where one was deleted since the job was planned."""
    for merge in sorted(merges):
        try:
            rows.get(connection, merge, lock=True)
        except MergeyardError:
            raise MergeyardError("source_not_found", f"merge:{merge} was deleted just now.") from None


def check_unused(connection: Connection, job: Job) -> None:
    """Raise ``merge_in_use`` while an alias or an unfinished job needs the job, whose row the caller has locked."""
    aliases.check_unaliased(connection, job.id)
    readers = (
        select(jobs.c.id)
        .join(merge_sources, merge_sources.c.job_id == jobs.c.id)
        .where(merge_sources.c.merge == job.id, jobs.c.finished_at.is_(None))
        .order_by(jobs.c.id)
        .limit(4)
    )
    if found := connection.scalars(readers).all():
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        message = f"Merges that have not finished read this one ({shown}): wait for them or cancel them first."
        raise MergeyardError("merge_in_use", message)


def _maker(artifact_id: object) -> Select[tuple[object, ...]]:
    return select(jobs).where(jobs.c.id == artifact_id)
