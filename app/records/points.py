"""What sweeps and evaluations score: rows that are there from the start, each of which gets its scores once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Row, select, update

from app.records import rows, transitions
from app.records.database import Database, clock
from app.records.job import Point, Unscored
from app.records.tables import points
from app.tasks.task import TaskScore

# Recipes are most of a row, and whoever polls needs none of them.
_SHOWN = tuple(points.c[field.name] for field in fields(Point))
_NEEDED = tuple(points.c[field.name] for field in fields(Unscored))


class Points:
    """The points in ``database``. Whose the job is was asked before: these are the points of any."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def of(self, job_id: str) -> Sequence[Point]:
        """A job's points in their order."""
        statement = select(*_SHOWN).where(points.c.job_id == job_id).order_by(points.c.number)
        with self.database.read() as connection:
            return [_read(row) for row in connection.execute(statement)]

    def unscored(self, job_id: str) -> Sequence[Unscored]:
        """Those without scores, in their order."""
        without = (points.c.job_id == job_id, points.c.scores.is_(None))
        with self.database.read() as connection:
            found = connection.execute(select(*_NEEDED).where(*without).order_by(points.c.number))
            return [Unscored(**row._mapping) for row in found]

    def recipe(self, job_id: str, number: int) -> Mapping[str, Any]:
        """What somebody would write to merge the point of that number, which there is."""
        chosen = select(points.c.recipe).where(points.c.job_id == job_id, points.c.number == number)
        with self.database.read() as connection:
            return dict(connection.scalars(chosen).one())

    def record(self, job_id: str, token: str, number: int, scores: Sequence[TaskScore]) -> None:
        """The point is scored. One that was before keeps what it has: a point is never scored twice.

        LeaseLost where ``token`` no longer holds the job: then nothing is written.
        """
        with self.database.write() as connection:
            job = rows.get_held(connection, job_id, token)
            now = clock(connection)
            unscored = (points.c.job_id == job_id, points.c.number == number, points.c.scores.is_(None))
            values = {"scores": [asdict(score) for score in scores], "scored_at": now}
            if connection.execute(update(points).where(*unscored).values(values)).rowcount:
                rows.apply(connection, job, transitions.score_point(job, now, number=number, scores=scores))


def _read(row: Row[Any]) -> Point:
    scores = None if row.scores is None else tuple(TaskScore(**score) for score in row.scores)
    return Point(**{**row._mapping, "scores": scores})
