"""What sweeps and evaluations score: rows that are there from the start, each of which gets its scores once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, select, update

from app.records import rows, transitions
from app.records.database import Database, clock
from app.records.job import Kind, Point
from app.records.key import Caller
from app.records.tables import points
from app.tasks.task import TaskScore


class Points:
    """The points in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def of(self, job_id: str, *, by: Caller | None = None, kind: Kind | None = None) -> Sequence[Point]:
        """A job's points in their order. ``not_found`` as in ``Jobs.get``."""
        statement = select(points).where(points.c.job_id == job_id).order_by(points.c.number)
        with self.database.read() as connection:
            rows.get(connection, job_id, by=by, kind=kind)
            return [_read(row) for row in connection.execute(statement)]

    def record(self, job_id: str, token: str, number: int, scores: Sequence[TaskScore]) -> None:
        """The point is scored. One that was before keeps what it has: a point is never scored twice.

        LeaseLost where ``token`` no longer holds the job: then nothing is written.
        """
        values: list[Mapping[str, Any]] = [asdict(score) for score in scores]
        with self.database.write() as connection:
            job = rows.get_held(connection, job_id, token)
            now = clock(connection)
            unscored = (points.c.job_id == job_id, points.c.number == number, points.c.scores.is_(None))
            if connection.execute(update(points).where(*unscored).values(scores=values, scored_at=now)).rowcount:
                rows.apply(connection, job, transitions.score_point(job, now, number=number, scores=values))


def _read(row: Row[Any]) -> Point:
    values = dict(row._mapping)
    del values["job_id"]
    return Point(**values | {"scores": None if row.scores is None else tuple(row.scores)})
