"""What waits and what runs, queue by queue, and who serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import case, func, select, union

from app.records.database import Database, clock
from app.records.key import Caller
from app.records.tables import IS_HELD, IS_QUEUED, jobs
from app.records.workers import Workers, WorkerState


class Urgency(StrEnum):
    """How a queue is served: all of one, then the next."""

    HIGH = "high"  # a priority above 0
    NORMAL = "normal"
    LOW = "low"  # below 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Jobs that wait, also those in a pause after a failure, and the seconds since the oldest was submitted."""

    jobs: int = 0
    oldest_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """One queue: what waits by urgency (every urgency is there), what runs, the names of the workers that serve it."""

    name: str
    waiting: Mapping[Urgency, Waiting]
    running: int
    workers: Sequence[str]


class Queues:
    """Queues in ``database``: those that somebody serves, or in which something waits or runs."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def list(self, *, by: Caller | None = None) -> Sequence[Queue]:
        """Queues by name, with everybody's jobs in them.

        ``by`` is whoever asks: a queue that no worker serves and that only others' jobs are in is not told, because
        its name is what another owner made up.
        """
        urgency = case((jobs.c.priority > 0, Urgency.HIGH), (jobs.c.priority < 0, Urgency.LOW), else_=Urgency.NORMAL)
        number = func.count()
        queued = select(jobs.c.queue, urgency, number, func.min(jobs.c.created_at))
        queued = queued.where(IS_QUEUED).group_by(jobs.c.queue, urgency)
        held = select(jobs.c.queue, number).where(IS_HELD).group_by(jobs.c.queue)
        with self.database.read() as connection:
            now = clock(connection)
            waiting: dict[str, dict[Urgency, Waiting]] = {}
            for name, kind, count, since in connection.execute(queued):
                waiting.setdefault(name, {})[Urgency(kind)] = Waiting(jobs=count, oldest_seconds=_age(now, since))
            running: dict[str, int] = dict(connection.execute(held).all())
            mine = None
            if by is not None and by.sees is not None:
                own = (select(jobs.c.queue).where(one, jobs.c.owner == by.sees) for one in (IS_QUEUED, IS_HELD))
                mine = frozenset(connection.scalars(union(*own)))
        serving: dict[str, list[str]] = {}
        for worker in Workers(self.database).list():
            for name in worker.queues if worker.state is not WorkerState.LOST else ():
                serving.setdefault(name, []).append(worker.name)
        names = {*serving, *waiting, *running} if mine is None else {*serving, *mine}
        return [
            Queue(
                name=name,
                waiting={kind: waiting.get(name, {}).get(kind, Waiting()) for kind in Urgency},
                running=running.get(name, 0),
                workers=serving.get(name, []),
            )
            for name in sorted(names)
        ]


def _age(now: datetime, since: datetime) -> float:
    return max(0.0, (now - since).total_seconds())
