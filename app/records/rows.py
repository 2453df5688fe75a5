"""Statements that more than one repository needs: reading a row under its lock, applying a rule, ids and cursors."""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, or_, select, update

from app.errors import MergeyardError
from app.records import quotas
from app.records.database import clock
from app.records.job import Idempotency, Job, Kind, LeaseLost, Listed, NewJob, Ring, Stage, Status
from app.records.key import ALPHABET, Caller, random_text
from app.records.outbox import enqueue
from app.records.tables import events, idempotency, jobs, merge_sources, points
from app.records.transitions import LONGEST_PAUSE, Change, Happening

HELD = (Status.RUNNING, Status.CANCELLING)
LISTED = tuple(jobs.c[field.name] for field in fields(Listed))  # what ``read_listed`` reads
_JOB_FIELDS = tuple(field.name for field in fields(Job))


def read_job(row: Row[Any]) -> Job:
    """The frozen value of a row of ``jobs``."""
    values = {name: row._mapping[name] for name in _JOB_FIELDS}
    values["warnings"] = tuple(values["warnings"])
    values["failures"] = tuple(values["failures"])
    return Job(**_with_words(values))


def read_listed(row: Row[Any]) -> Listed:
    """The frozen value of ``LISTED``."""
    return Listed(**_with_words(dict(row._mapping)))


def get(
    connection: Connection,
    job_id: str,
    *,
    by: Caller | None = None,
    lock: bool = False,
    kind: Kind | None = Kind.MERGE,
) -> Job:
    """The job, locked until the transaction ends where ``lock``. ``kind`` None: of any.

    ``not_found`` for an id that is unknown, deleted, another kind's or another owner's than ``by`` sees: nobody can
    tell which.
    """
    statement = select(jobs).where(jobs.c.id == job_id, jobs.c.deleted_at.is_(None))
    if kind is not None:
        statement = statement.where(jobs.c.kind == kind)
    if by is not None and by.sees is not None:
        statement = statement.where(jobs.c.owner == by.sees)
    row = connection.execute(statement.with_for_update() if lock else statement).one_or_none()
    if row is None:
        raise MergeyardError("not_found", f"There is no {kind or 'job'} with this id.")
    return read_job(row)


def get_held(connection: Connection, job_id: str, token: str) -> Job:
    """The job that ``token`` holds, locked until the transaction ends. LeaseLost where it holds none."""
    held = select(jobs).where(jobs.c.id == job_id, jobs.c.lease_token == token, jobs.c.status.in_(HELD))
    row = connection.execute(held.with_for_update()).one_or_none()
    if row is None:
        raise LeaseLost(job_id)
    return read_job(row)


def apply(connection: Connection, job: Job, change: Change) -> Job:
    """Write what a rule decided about ``job``, which was read under its lock in this transaction."""
    if not change.values and not change.events:
        return job
    now = clock(connection)
    row = connection.execute(
        update(jobs)
        .where(
            jobs.c.id == job.id,
            jobs.c.version == job.version,
            jobs.c.lease_token.is_not_distinct_from(job.lease_token),
        )
        .values(**change.values, updated_at=now, version=jobs.c.version + 1)
        .returning(jobs)
    ).one_or_none()
    if row is None:
        raise LeaseLost(job.id)
    append(connection, job.id, now, *change.events)
    written = read_job(row)
    quotas.account(connection, job.owner, quotas.taken_by(written) - quotas.taken_by(job))
    enqueue(connection, written, now, [kind for kind, _ in change.events])
    return written


def append(connection: Connection, job_id: str, now: datetime, *happenings: Happening) -> None:
    """Add events. The job's row is locked by whoever calls, so a job's events are numbered in their order."""
    for kind, data in happenings:
        connection.execute(insert(events).values(job_id=job_id, type=kind, at=now, data=dict(data), counted=False))


def insert_job(connection: Connection, new: NewJob, key: Idempotency | None) -> Job:
    """A queued job, and the key that made it."""
    now = clock(connection)
    job_id = new_id(now, new.kind)
    row = connection.execute(
        insert(jobs)
        .values(
            id=job_id,
            kind=new.kind,
            status=Status.QUEUED,
            version=1,
            queue=new.queue,
            priority=new.priority,
            owner=new.owner,
            labels=dict(new.labels),
            recipe=dict(new.recipe),
            resolved=dict(new.resolved),
            method=new.method,
            plan_digest=new.plan_digest,
            estimates=dict(new.estimates),
            warnings=[dict(warning) for warning in new.warnings],
            attempt=0,
            failures=[],
            max_attempts=new.max_attempts,
            progress_bytes=0,
            total_bytes=new.total_bytes,
            reserved_bytes=new.reserves,
            pinned=new.pinned,
            expires_in=new.expires_in,
            webhook=None if new.webhook is None else dict(new.webhook),
            created_at=now,
            updated_at=now,
            rung_at=now,
            swept=False,
        )
        .returning(jobs)
    ).one()
    job = read_job(row)
    quotas.account(connection, job.owner, quotas.taken_by(job))
    append(connection, job_id, now, ("submitted", {}))
    if key is not None:
        connection.execute(
            insert(idempotency).values(owner=key.owner, key=key.key, request_hash=key.request_hash, job_id=job_id)
        )
    if new.merges:
        read = [{"job_id": job_id, "merge": merge} for merge in new.merges]
        connection.execute(insert(merge_sources), read)
    if new.points:
        scored = [{"job_id": job_id, "number": number, **asdict(point)} for number, point in enumerate(new.points)]
        connection.execute(insert(points), scored)
    return job


def earlier(connection: Connection, key: Idempotency) -> Job | None:
    """The job the key made before; ``idempotency_mismatch`` where another request did."""
    row = connection.execute(
        select(idempotency.c.request_hash, idempotency.c.job_id).where(
            idempotency.c.owner == key.owner, idempotency.c.key == key.key
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request_hash != key.request_hash:
        raise MergeyardError(
            "idempotency_mismatch",
            "This Idempotency-Key came with another request before; use a new key for a new request.",
        )
    return get(connection, row.job_id, kind=None)


def may_start(now: datetime) -> ColumnElement[bool]:
    """That a queued job does not wait for its ``retry_at``."""
    too_far = now + timedelta(seconds=LONGEST_PAUSE + 1)  # the clock was set back: no job waits that long
    return or_(jobs.c.retry_at.is_(None), jobs.c.retry_at <= now, jobs.c.retry_at > too_far)


def ring(job: Job | Row[Any]) -> Ring:
    """The doorbell of a queued job."""
    return Ring(id=job.id, queue=job.queue, priority=job.priority)


_PREFIXES = {Kind.MERGE: "mrg", Kind.SWEEP: "swp", Kind.EVALUATION: "evl"}


def new_id(now: datetime, kind: Kind = Kind.MERGE) -> str:
    """``mrg-`` (or its kind's), 10 characters of milliseconds, 16 random ones: sorts by time, and cannot be guessed."""
    milliseconds = int(now.timestamp() * 1000)
    moment = "".join(ALPHABET[milliseconds >> shift & 31] for shift in range(45, -1, -5))
    return f"{_PREFIXES[kind]}-{moment}{random_text(16)}"


def write_cursor(job: Listed) -> str:
    """Where the page after ``job`` begins."""
    text = f"{job.created_at.astimezone(UTC).isoformat()}|{job.id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[datetime, str]:
    """(created_at, id) of the last job of the page before. ``request_invalid`` for anything we did not write."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        moment, job_id = text.split("|")
        if not job_id.isprintable():  # PostgreSQL takes no NUL, not even to compare with
            raise ValueError(job_id)
        return datetime.fromisoformat(moment).astimezone(UTC), job_id
    except (ValueError, OverflowError, binascii.Error):
        raise MergeyardError(
            "request_invalid", "The cursor is not one that this service gave out.", where="cursor"
        ) from None


def _with_words(values: dict[str, Any]) -> dict[str, Any]:
    values["kind"] = Kind(values["kind"])
    values["status"] = Status(values["status"])
    values["stage"] = None if values["stage"] is None else Stage(values["stage"])
    return values
