"""What may be stored and what may wait: the bytes that are kept, those that unfinished jobs will need, and the limits.

Reserved is what the plans of all unfinished jobs estimate, added up from their rows whenever it is asked: a job that
ended, however it did, reserves nothing. Kept are artifacts (``usage`` has their sum by owner: there may be a million)
and uploads. Whatever admits something looks at all of this in one statement, and under ``exclusively``, so that two
requests at once cannot both take the last bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Select, func, select, text
from sqlalchemy.dialects import postgresql, sqlite

from app.errors import MergeyardError
from app.records.database import Database
from app.records.job import NewJob, NoRoom, Status
from app.records.tables import jobs, shards, uploads, usage

QUOTA_LOCK = 0x71756F74  # "quot": the PostgreSQL advisory lock of whoever admits something
UNFINISHED = jobs.c.finished_at.is_(None)  # as in the index that the sums are read from
HELD = jobs.c.lease_token.is_not(None)

log = logging.getLogger("mergeyard.quotas")

Free = Callable[[], int | None]  # bytes that the store can still take; None: it has no end


def _no_end() -> int | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that one owner and all owners together may keep and reserve, unfinished jobs of one owner; None: any."""

    owner_bytes: int | None = None
    owner_jobs: int | None = None
    store_bytes: int | None = None
    free: Free = _no_end


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes: of published artifacts, of uploads, and ``reserved`` by the ``unfinished`` jobs."""

    artifacts: int
    uploads: int
    reserved: int
    unfinished: int

    @property
    def total(self) -> int:
        return self.artifacts + self.uploads + self.reserved

    def __str__(self) -> str:
        parts = f"{self.artifacts} of artifacts, {self.uploads} of uploads"
        merges = "1 unfinished merge" if self.unfinished == 1 else f"{self.unfinished} unfinished merges"
        return f"{self.total} bytes are taken ({parts}, {self.reserved} reserved by {merges})"


class Quotas:
    """What is kept and reserved in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def of_owner(self, owner: str) -> Usage:
        """One owner's; what several owners have uploaded counts for each of them."""
        with self.database.read() as connection:
            return _read(connection, _of_owner(owner))

    def of_all(self) -> Usage:
        """Everybody's; what several owners have uploaded is stored once, and counts once."""
        with self.database.read() as connection:
            return _read(connection, _of_all())

    def check_upload(self, owner: str, size: int, limits: Limits) -> None:
        """Raise as ``admit_upload`` does, before ``size`` bytes are received in vain."""
        with self.database.read() as connection:
            _check_bytes(connection, owner, size, f"An upload of {size} bytes", limits)


def exclusively(connection: Connection) -> None:
    """Nobody else admits anything until this transaction ends. On SQLite it holds the only write lock already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": QUOTA_LOCK})


def admit(connection: Connection, new: NewJob, limits: Limits) -> None:
    """Let a job in, or raise `too_many_jobs`, `over_quota` or `storage_full`. In the transaction that inserts it."""
    if limits == NO_LIMITS:
        return
    exclusively(connection)
    if limits.owner_jobs is not None:
        unfinished = _read(connection, _of_owner(new.owner)).unfinished
        if unfinished >= limits.owner_jobs:
            message = (
                f"{new.owner} has {unfinished} unfinished merges, and may have {limits.owner_jobs}: wait until some "
                "have finished, or cancel them."
            )
            raise MergeyardError("too_many_jobs", message)
    what = f"The merge takes about {new.total_bytes} bytes"
    _check_bytes(connection, new.owner, new.total_bytes, what, limits)
    promised = _promised(connection, UNFINISHED)
    free = asked(limits.free)  # after that was read: what is written meanwhile counts twice, and never not at all
    if free is not None and new.total_bytes > free - promised:
        message = (
            f"{what}; the store has {free} bytes free, of which unfinished merges will need {promised}. Submit it "
            "again when there is more, or ask the operator for room."
        )
        raise MergeyardError("storage_full", message)


def admit_upload(connection: Connection, owner: str, size: int, limits: Limits) -> None:
    """Let an upload in, or raise `over_quota` or `storage_full`. In the transaction that inserts its row."""
    exclusively(connection)
    _check_bytes(connection, owner, size, f"The upload has {size} bytes", limits)


def check_room(connection: Connection, job_id: str, free: Free) -> None:
    """Raise NoRoom where the store has too little for a queued job, beside what running attempts still need.

    In the transaction that claims it: two workers cannot both begin with the same room.
    """
    exclusively(connection)
    kept = select(func.coalesce(func.sum(shards.c.size), 0)).where(shards.c.job_id == job_id).scalar_subquery()
    queued = select(jobs.c.reserved_bytes - kept).where(jobs.c.id == job_id, jobs.c.status == Status.QUEUED)
    needs = connection.scalar(queued)
    promised = _promised(connection, HELD)
    found = asked(free)
    if needs is not None and found is not None and needs > found - promised:
        raise NoRoom(job_id, needs=int(needs), free=max(0, found - promised))


def asked(free: Free) -> int | None:
    """What ``free`` answers. A store that cannot be asked binds nobody: whoever writes to it will see what it lacks."""
    try:
        return free()
    except OSError as error:
        log.warning("the store does not say what is free: %s", error)
        return None


def account(connection: Connection, owner: str, grown: int) -> None:
    """The artifacts of ``owner`` are ``grown`` bytes more. In the transaction that publishes or deletes one."""
    if grown == 0:
        return
    inserting = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert
    row = inserting(usage).values(owner=owner, artifact_bytes=grown)
    connection.execute(
        row.on_conflict_do_update(
            index_elements=[usage.c.owner],
            set_={"artifact_bytes": usage.c.artifact_bytes + row.excluded.artifact_bytes},
        )
    )


def _check_bytes(connection: Connection, owner: str, size: int, what: str, limits: Limits) -> None:
    if limits.owner_bytes is not None:
        own = _read(connection, _of_owner(owner))
        if own.total + size > limits.owner_bytes:
            message = (
                f"{what}; {owner} may have {limits.owner_bytes}, and {own}. Delete merges that are no longer needed, "
                "wait for unfinished ones, or ask the operator for a larger quota."
            )
            raise MergeyardError("over_quota", message)
    if limits.store_bytes is not None:
        all_of_them = _read(connection, _of_all())
        if all_of_them.total + size > limits.store_bytes:
            message = (
                f"{what}; the service may keep {limits.store_bytes}, and {all_of_them}. Delete merges that are no "
                "longer needed, or ask the operator for room."
            )
            raise MergeyardError("storage_full", message)


def _of_owner(owner: str) -> Select[tuple[int, ...]]:
    return _usage(
        artifacts=select(usage.c.artifact_bytes).where(usage.c.owner == owner),
        uploaded=select(func.sum(uploads.c.size)).where(uploads.c.owner == owner),
        unfinished=jobs.c.owner == owner,
    )


def _of_all() -> Select[tuple[int, ...]]:
    stored = select(func.max(uploads.c.size).label("size")).group_by(uploads.c.digest).subquery()
    return _usage(
        artifacts=select(func.sum(usage.c.artifact_bytes)),
        uploaded=select(func.sum(stored.c.size)),
    )


def _usage(
    artifacts: Select[tuple[int]], uploaded: Select[tuple[int]], unfinished: ColumnElement[bool] | None = None
) -> Select[tuple[int, ...]]:
    """One statement, so one moment: what is published between two would be in neither or in both."""
    of_jobs = select(func.sum(jobs.c.reserved_bytes).label("reserved"), func.count().label("unfinished"))
    of_jobs = of_jobs.where(UNFINISHED if unfinished is None else UNFINISHED & unfinished)
    found = of_jobs.subquery()
    return select(
        func.coalesce(artifacts.scalar_subquery(), 0).label("artifacts"),
        func.coalesce(uploaded.scalar_subquery(), 0).label("uploads"),
        func.coalesce(found.c.reserved, 0).label("reserved"),
        found.c.unfinished,
    )


def _promised(connection: Connection, which: ColumnElement[bool]) -> int:
    """The bytes that jobs will still take: what they reserve, less what running ones have in finished files."""
    reserved = select(func.coalesce(func.sum(jobs.c.reserved_bytes), 0)).where(which).scalar_subquery()
    running = select(jobs.c.id).where(HELD)
    written = select(func.coalesce(func.sum(shards.c.size), 0)).where(shards.c.job_id.in_(running)).scalar_subquery()
    row = connection.execute(select(reserved.label("reserved"), written.label("written"))).one()
    return max(0, int(row.reserved) - int(row.written))


def _read(connection: Connection, statement: Select[tuple[int, ...]]) -> Usage:
    row = connection.execute(statement).one()
    return Usage(**{name: int(value) for name, value in row._mapping.items()})
