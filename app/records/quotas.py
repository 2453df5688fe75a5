"""What may be stored and what may wait: the bytes that are kept, those that unfinished jobs will need, and the limits.

Reserved is what the plans of all unfinished jobs estimate: a job that ended, however it did, reserves nothing. Kept are
artifacts and uploads. There may be a million jobs, so ``usage`` has the sums by owner. Each changes in the transaction
that writes the row, in the two functions through which all of them go (``rows.insert_job``, ``rows.apply``), and the
janitor adds the reservations up anew (``Quotas.recount``). Whatever admits something does so ``exclusively``, so that
two requests at once cannot both take the last bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, Select, func, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from app.errors import MergeyardError
from app.records.database import Database
from app.records.job import Job, NewJob, NoRoom, Status
from app.records.tables import IS_HELD, jobs, shards, uploads, usage

QUOTA_LOCK = 0x71756F74  # "quot": the PostgreSQL advisory lock of whoever admits something
UNFINISHED = jobs.c.finished_at.is_(None)  # as in the index that the sums are read from

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


@dataclass(frozen=True, slots=True)
class Taken:
    """What jobs take, or how much more: bytes of ``artifacts``, bytes ``reserved``, how many are ``unfinished``."""

    artifacts: int = 0
    reserved: int = 0
    unfinished: int = 0

    def __sub__(self, other: Taken) -> Taken:
        return Taken(
            self.artifacts - other.artifacts, self.reserved - other.reserved, self.unfinished - other.unfinished
        )


NOTHING = Taken()


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

    def recount(self) -> bool:
        """Add up anew what unfinished jobs reserve. True where the sums were wrong: somebody wrote to the rows by hand.

        The sums are locked before the rows are read: whoever has changed a row and not yet its sum waits, and adds to
        the new one.
        """
        with self.database.write() as connection:
            exclusively(connection)
            told = {
                row.owner: (row.reserved_bytes, row.unfinished)
                for row in connection.execute(select(usage).with_for_update())
            }
            reserved, number = func.sum(jobs.c.reserved_bytes), func.count()
            counted = {
                owner: (int(size), count)
                for owner, size, count in connection.execute(
                    select(jobs.c.owner, reserved, number).where(UNFINISHED).group_by(jobs.c.owner)
                )
            }
            wrong = [owner for owner in told if told[owner] != counted.get(owner, (0, 0))]
            for owner in wrong:
                size, count = counted.get(owner, (0, 0))
                right = update(usage).where(usage.c.owner == owner).values(reserved_bytes=size, unfinished=count)
                connection.execute(right)
        return bool(wrong)

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
    what = f"The {new.kind} takes about {new.reserves} bytes"
    _check_bytes(connection, new.owner, new.reserves, what, limits)
    promised = max(0, _read(connection, _of_all()).reserved - _written(connection))
    free = asked(limits.free)  # after that was read: what is written meanwhile counts twice, and never not at all
    if free is not None and new.reserves > free - promised:
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
    held = connection.scalar(select(func.coalesce(func.sum(jobs.c.reserved_bytes), 0)).where(IS_HELD))
    promised = max(0, int(held or 0) - _written(connection))
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


def taken_by(job: Job) -> Taken:
    """What a job takes as it is. A finished one takes NOTHING: its artifact may be others' too, and is taken once."""
    if job.status.finished:
        return NOTHING
    return Taken(reserved=job.reserved_bytes, unfinished=1)


def account(connection: Connection, owner: str, grown: Taken) -> None:
    """The jobs of ``owner`` take so much more, in the transaction that makes it so."""
    if grown == NOTHING:
        return
    inserting = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert
    row = inserting(usage).values(
        owner=owner, artifact_bytes=grown.artifacts, reserved_bytes=grown.reserved, unfinished=grown.unfinished
    )
    sums = (usage.c.artifact_bytes, usage.c.reserved_bytes, usage.c.unfinished)
    connection.execute(
        row.on_conflict_do_update(
            index_elements=[usage.c.owner], set_={one.name: one + row.excluded[one.name] for one in sums}
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
    uploaded = select(func.sum(uploads.c.size)).where(uploads.c.owner == owner)
    return _sums(uploaded).where(usage.c.owner == owner)


def _of_all() -> Select[tuple[int, ...]]:
    stored = select(func.max(uploads.c.size).label("size")).group_by(uploads.c.digest).subquery()
    return _sums(select(func.sum(stored.c.size)))


def _sums(uploaded: Select[tuple[int]]) -> Select[tuple[int, ...]]:
    return select(
        func.coalesce(func.sum(usage.c.artifact_bytes), 0).label("artifacts"),
        func.coalesce(func.sum(usage.c.reserved_bytes), 0).label("reserved"),
        func.coalesce(func.sum(usage.c.unfinished), 0).label("unfinished"),
        func.coalesce(uploaded.scalar_subquery(), 0).label("uploads"),
    )


def _written(connection: Connection) -> int:
    """Of what running jobs reserve, the bytes in finished files: they are no longer free, and no longer to be taken."""
    running = select(jobs.c.id).where(IS_HELD)
    return int(connection.scalar(select(func.sum(shards.c.size)).where(shards.c.job_id.in_(running))) or 0)


def _read(connection: Connection, statement: Select[tuple[int, ...]]) -> Usage:
    row = connection.execute(statement).one()
    return Usage(**{name: int(value) for name, value in row._mapping.items()})
