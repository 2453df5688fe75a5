"""The repository of workers: each process that serves a queue has a row, which says so as long as it lives.

The rows are for people. Who holds a job is said by the job's lease alone, so a row that is wrong costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import Connection, delete, func, insert, select, update

from app.records.database import Database, clock
from app.records.key import Caller
from app.records.tables import IS_HELD, events, jobs, workers

BEAT_SECONDS = 10.0
LOST_SECONDS = 45.0  # without a beat: a few of them may be late
FORGOTTEN_SECONDS = 86_400.0  # a lost worker is shown this long, for whoever looks for it


class WorkerState(StrEnum):
    IDLE = "idle"  # alive, and waits for a job
    BUSY = "busy"  # alive, and holds one
    LOST = "lost"  # has not been heard of for LOST_SECONDS; one that stops in good order leaves no row


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWorker:
    """What a worker says of itself when it starts. ``name`` is its own and nobody's after it."""

    name: str
    host: str
    process: int
    queues: Sequence[str]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker as it was last seen. Times are the database's clock, UTC.

    ``device`` None: it is still starting. ``job``: what it holds, where whoever asks may see that merge; ``state``
    tells of it either way.
    """

    name: str
    host: str
    process: int
    device: str | None
    queues: Sequence[str]
    version: str
    state: WorkerState
    job: str | None
    started_at: datetime
    seen_at: datetime


class Workers:
    """Workers in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def beat(self, worker: NewWorker, *, started_at: datetime, device: str | None) -> str | None:
        """The worker lives. Returns its device; ``device`` is what it was last told, for a row that has gone."""
        with self.database.write() as connection:
            now = clock(connection)
            row = connection.execute(
                update(workers).where(workers.c.name == worker.name).values(seen_at=now).returning(workers.c.device)
            ).one_or_none()
            if row is not None:
                found: str | None = row.device
                return found
            connection.execute(
                insert(workers).values(
                    name=worker.name,
                    host=worker.host,
                    process=worker.process,
                    device=device,
                    queues=list(worker.queues),
                    version=worker.version,
                    started_at=started_at,
                    seen_at=now,
                )
            )
            return device

    def set_device(self, name: str, device: str) -> None:
        """What the worker calculates on: its child knows once it is warm."""
        with self.database.write() as connection:
            connection.execute(update(workers).where(workers.c.name == name).values(device=device))

    def leave(self, name: str) -> None:
        """The worker stops in good order."""
        with self.database.write() as connection:
            connection.execute(delete(workers).where(workers.c.name == name))

    def forget(self) -> int:
        """Remove those that have been lost for long; how many they were."""
        with self.database.read() as connection:  # a writer would hold SQLite's lock for nothing
            gone = workers.c.seen_at < clock(connection) - timedelta(seconds=FORGOTTEN_SECONDS)
            if not connection.scalar(select(func.count()).select_from(workers).where(gone)):
                return 0
        with self.database.write() as connection:
            return connection.execute(delete(workers).where(gone)).rowcount

    def list(self, *, by: Caller | None = None) -> Sequence[Worker]:
        """Every worker by name. ``by`` is whoever asks: the ids of other owners' merges are not told."""
        with self.database.read() as connection:
            lost_before = clock(connection) - timedelta(seconds=LOST_SECONDS)
            held = _held(connection)
            rows = connection.execute(select(workers).order_by(workers.c.name)).all()
        found = []
        for row in rows:
            job_id, owner = held.get(row.name, (None, ""))
            lost = row.seen_at < lost_before
            state = WorkerState.LOST if lost else WorkerState.IDLE if job_id is None else WorkerState.BUSY
            told = by is None or by.sees in (None, owner)
            found.append(Worker(**row._mapping, state=state, job=job_id if told else None))
        return found


def _held(connection: Connection) -> dict[str, tuple[str, str]]:
    """By the worker's name: the job that it holds and the job's owner, from the claim that is in force."""
    # Of each held job by itself: a GROUP BY over events would go through all that there are.
    claims = select(func.max(events.c.id)).where(events.c.job_id == jobs.c.id, events.c.type == "claimed")
    last = claims.correlate(jobs).scalar_subquery()
    held = select(jobs.c.id, jobs.c.owner, events.c.data).join(events, events.c.id == last).where(IS_HELD)
    return {row.data["worker"]: (row.id, row.owner) for row in connection.execute(held)}
