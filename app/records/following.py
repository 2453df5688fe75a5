"""What happens to watched jobs: one look at all of them at once, for whoever tells their followers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import Connection, and_, or_, select

from app.records.database import Database
from app.records.job import Event, Job, Stage, Status
from app.records.tables import events, jobs

AT_ONCE = 200  # jobs in one statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of a job, what its followers were told last: the row's ``version`` and the number of an event; 0 is nothing."""

    version: int
    event: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a job stands; of its progress ``bytes_done`` of ``bytes_total``."""

    version: int
    status: Status
    stage: Stage | None
    attempt: int
    bytes_done: int
    bytes_total: int

    @classmethod
    def of(cls, job: Job) -> Standing:
        return cls(
            version=job.version,
            status=job.status,
            stage=job.stage,
            attempt=job.attempt,
            bytes_done=job.progress_bytes,
            bytes_total=job.total_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What is new of a job: where it stands (None: its row is gone) and its events since, oldest first."""

    standing: Standing | None
    events: Sequence[Event]


class Following:
    """Looks at jobs in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def look(self, seen: Mapping[str, Seen]) -> Mapping[str, News]:
        """By id, what is new of those jobs of which anything is.

        Every event comes with a new version of its job's row, and a job's events are numbered in their order: so rows
        of an unchanged version need no second look, and no event below a seen one can turn up late.
        """
        found: dict[str, News] = {}
        with self.database.read() as connection:
            for ids in _batches(seen):
                changed = {
                    job_id: standing
                    for job_id, standing in _standings(connection, ids).items()
                    if standing is None or standing.version != seen[job_id].version
                }
                happened: dict[str, list[Event]] = {job_id: [] for job_id in changed}
                for event in _events(connection, {job_id: seen[job_id].event for job_id in changed}):
                    happened[event.job_id].append(event)
                found |= {
                    job_id: News(standing=standing, events=happened[job_id]) for job_id, standing in changed.items()
                }
        return found


def _batches(seen: Mapping[str, Seen]) -> Iterator[list[str]]:
    ids = iter(seen)
    while batch := list(islice(ids, AT_ONCE)):
        yield batch


def _standings(connection: Connection, ids: Sequence[str]) -> dict[str, Standing | None]:
    columns = (
        jobs.c.version,
        jobs.c.status,
        jobs.c.stage,
        jobs.c.attempt,
        jobs.c.progress_bytes.label("bytes_done"),
        jobs.c.total_bytes.label("bytes_total"),
    )
    found: dict[str, Standing | None] = dict.fromkeys(ids)
    for row in connection.execute(select(jobs.c.id, *columns).where(jobs.c.id.in_(ids))):
        found[row.id] = Standing(
            version=row.version,
            status=Status(row.status),
            stage=None if row.stage is None else Stage(row.stage),
            attempt=row.attempt,
            bytes_done=row.bytes_done,
            bytes_total=row.bytes_total,
        )
    return found


def _events(connection: Connection, after: Mapping[str, int]) -> list[Event]:
    if not after:
        return []
    later = [and_(events.c.job_id == job_id, events.c.id > number) for job_id, number in after.items()]
    statement = select(events.c.id, events.c.job_id, events.c.type, events.c.at, events.c.data)
    return [Event(**row._mapping) for row in connection.execute(statement.where(or_(*later)).order_by(events.c.id))]
