"""The tally: what happened to all jobs, as totals that only grow, counted from their events.

Events are written in the transactions that change jobs, whichever process does it, so the totals hold what happened and
nothing else, and survive every process. An event is marked in the transaction that adds it to the totals: it is counted
once. A mark, and not the last number seen: PostgreSQL may commit a lower number after a higher one.

Of the present (``load``) only what waits or runs is looked at, so the cost does not grow with what has finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection, Select, and_, exists, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from app.records.database import Database, clock
from app.records.job import Stage, Status
from app.records.tables import IS_HELD, IS_QUEUED, events, jobs, totals

BATCH = 1000  # events in one transaction
BATCHES = 20  # of one call; the next call goes on

# Seconds: from an adapter of a small model to a checkpoint that takes hours.
BOUNDS = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)
BOUND_NAMES = (*map(str, BOUNDS), "+Inf")
SUM = "sum"  # in milliseconds

QUEUED = "queued"  # the stage before an attempt: waiting for a worker, or for the pause after a failure to end
_BEGIN = ("submitted", "claimed", "stage", "retried", "handed_back", "worker_lost")
# Not worker_lost: when the worker died nobody knows, and the lease's length is not the stage's.
_END = ("claimed", "stage", "succeeded", "failed", "retried", "handed_back", "cancelled")

Key = tuple[str, str, str]  # name, label and bound of a row of ``totals``


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """Of an event, what counting needs."""

    type: str
    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """A histogram: how many took at most each of ``BOUND_NAMES`` (seconds, cumulated), and all of them together."""

    at_most: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """``counts`` by name and label; a name without labels has one that is empty. ``stages``: durations by stage.

    ``submitted``, ``claimed``, ``handed_back``, ``expired``: how often. ``finished`` by status (``reused`` is none of
    ``succeeded``), ``failed`` and ``retried`` by the
    error's code, ``lost`` by reason. ``written_bytes``: of weight files of any attempt. ``published_bytes``: of
    everything published.
    """

    counts: Mapping[str, Mapping[str, int]]
    stages: Mapping[str, Durations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The jobs that wait in one queue, and for how long the oldest has since it was submitted."""

    queue: str
    jobs: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What there is to do: the ``queues`` in which jobs wait, the longest first, and how many are being worked on.

    ``without_room``: of the waiting ones, those for which a worker found too little of the store.
    """

    queues: tuple[Waiting, ...]
    running: int
    cancelling: int
    without_room: int


class Tally:
    """Totals and load of the jobs in ``database``. Any number of processes may count at once."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def count(self) -> int:
        """Add new events to the totals, at most ``BATCH * BATCHES``; how many they were."""
        counted = 0
        for _ in range(BATCHES):
            if not self._anything_new():
                break
            counted += self._count_batch()
        return counted

    def totals(self) -> Totals:
        """Everything counted so far."""
        with self.database.read() as connection:
            found: dict[Key, int] = {
                (row.name, row.label, row.bound): row.value for row in connection.execute(select(totals))
            }
        counts: dict[str, dict[str, int]] = {}
        for (name, label, bound), value in found.items():
            if not bound:
                counts.setdefault(name, {})[label] = value
        stages = sorted({label for name, label, bound in found if name == "stage" and bound})
        return Totals(counts=counts, stages={stage: _durations(found, stage) for stage in stages})

    def load(self) -> Load:
        """What waits and what runs."""
        number = func.count()
        queues = select(jobs.c.queue, number, func.min(jobs.c.created_at)).where(IS_QUEUED).group_by(jobs.c.queue)
        held = select(jobs.c.status, number).where(IS_HELD).group_by(jobs.c.status)
        with self.database.read() as connection:
            now = clock(connection)
            waiting = [
                Waiting(queue=queue, jobs=count, oldest_seconds=max(0.0, (now - since).total_seconds()))
                for queue, count, since in connection.execute(queues)
            ]
            working: dict[str, int] = dict(connection.execute(held).all())
            without_room = connection.scalar(select(number).select_from(jobs).where(jobs.c.waits_for.is_not(None)))
        return Load(
            queues=tuple(sorted(waiting, key=lambda queue: (-queue.jobs, queue.queue))),
            running=working.get(Status.RUNNING, 0),
            cancelling=working.get(Status.CANCELLING, 0),
            without_room=without_room or 0,
        )

    def _anything_new(self) -> bool:
        with self.database.read() as connection:  # a writer would hold SQLite's lock for nothing
            return bool(connection.scalar(select(exists().where(~events.c.counted))))

    def _count_batch(self) -> int:
        grown: Counter[Key] = Counter()
        with self.database.write() as connection:
            ids = connection.scalars(uncounted().with_for_update(skip_locked=True)).all()
            for row in connection.execute(_with_beginnings(ids)):
                event = Happened(type=row.type, at=row.at, data=row.data)
                began = None
                if row.began_type is not None:
                    began = Happened(type=row.began_type, at=row.began_at, data=row.began_data)
                for key, value in increments(event, began):
                    grown[key] += value
            connection.execute(update(events).where(events.c.id.in_(ids)).values(counted=True))
            _add(connection, grown)
        return len(ids)


def uncounted() -> Select[int]:
    """The next events to count."""
    return select(events.c.id).where(~events.c.counted).order_by(events.c.id).limit(BATCH)


def increments(event: Happened, began: Happened | None) -> Iterator[tuple[Key, int]]:
    """What an event adds to the totals. ``began``: the job's event before it that began a stage, if this ends one."""
    match event.type:
        case "submitted" | "claimed" | "handed_back" | "expired":
            yield (event.type, "", ""), 1
        case "reused":
            yield ("finished", event.type, ""), 1
        case "succeeded" if event.data.get("reused"):
            return  # it took nothing, and nothing more is kept
        case "succeeded":
            yield ("finished", event.type, ""), 1
            yield ("published_bytes", "", ""), event.data.get("size") or 0
        case "failed":
            yield ("finished", event.type, ""), 1
            yield ("failed", event.data["error"]["code"], ""), 1
        case "cancelled":
            yield ("finished", event.type, ""), 1
        case "retried":
            yield ("retried", event.data["error"]["code"], ""), 1
        case "worker_lost":
            yield ("lost", event.data["reason"], ""), 1
        case "shard":
            yield ("written_bytes", "", ""), event.data["size"]
    if began is not None and event.type in _END:
        yield from _duration(event, began)


def _duration(event: Happened, began: Happened) -> Iterator[tuple[Key, int]]:
    if began.type == "worker_lost" and began.at == event.at:
        return  # the same transaction: nothing was waited for
    stage = {"claimed": str(Stage.RESOLVING), "stage": began.data.get("stage", "")}.get(began.type, QUEUED)
    seconds = max(0.0, (event.at - began.at).total_seconds())
    bound = next((str(bound) for bound in BOUNDS if seconds <= bound), BOUND_NAMES[-1])
    yield ("stage", stage, bound), 1
    yield ("stage", stage, SUM), round(seconds * 1000)


def _with_beginnings(ids: Sequence[int]) -> Select[Any]:
    """These events, and beside each that ends a stage the event of its job that began it."""
    earlier, began = events.alias(), events.alias()
    last = (
        select(earlier.c.id)
        .where(earlier.c.job_id == events.c.job_id, earlier.c.id < events.c.id, earlier.c.type.in_(_BEGIN))
        .order_by(earlier.c.id.desc())
        .limit(1)
        .correlate(events)
        .scalar_subquery()
    )
    return (
        select(
            events.c.type,
            events.c.at,
            events.c.data,
            began.c.type.label("began_type"),
            began.c.at.label("began_at"),
            began.c.data.label("began_data"),
        )
        .select_from(events.outerjoin(began, and_(events.c.type.in_(_END), began.c.id == last)))
        .where(events.c.id.in_(ids))
    )


def _add(connection: Connection, grown: Mapping[Key, int]) -> None:
    """In order of their keys, so that two who count at once wait for each other and never in a circle."""
    insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert
    for (name, label, bound), value in sorted(grown.items()):
        row = insert(totals).values(name=name, label=label, bound=bound, value=value)
        connection.execute(
            row.on_conflict_do_update(
                index_elements=[totals.c.name, totals.c.label, totals.c.bound],
                set_={"value": totals.c.value + row.excluded.value},
            )
        )


def _durations(found: Mapping[Key, int], stage: str) -> Durations:
    buckets = (found.get(("stage", stage, bound), 0) for bound in BOUND_NAMES)
    return Durations(at_most=tuple(accumulate(buckets)), seconds=found.get(("stage", stage, SUM), 0) / 1000)
