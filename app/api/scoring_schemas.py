"""What the API answers about sweeps and evaluations: one model a document, made from the records' frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas import (
    Document,
    FailedAttempt,
    JobSummary,
    ProblemItem,
    Score,
    WebhookDocument,
    job_details,
    job_summary,
    job_url,
)
from app.records.job import POINT_UNITS, Job, Listed, Point, Status
from app.sweeps.results import Row, Scored, best_of, rows_of


class PointProgress(Document):
    """What is scored: the base, models by themselves, and points. ``fraction`` is between 0 and 1."""

    points_done: int
    points_total: int
    fraction: float


class ScoringUrls(Document):
    self: str
    events: str
    cancel: str


class ScoringSummary(JobSummary):
    """A sweep or an evaluation as lists show it."""

    progress: PointProgress
    fingerprint: str = Field(description="sha256 over everything that is merged and everything that is asked")
    urls: ScoringUrls

    @classmethod
    def listed(cls, job: Listed) -> ScoringSummary:
        return cls(**_summary(job))


class ScoringPage(Document):
    """One page, newest first. ``next_cursor`` is null on the last page."""

    items: list[ScoringSummary]
    next_cursor: str | None


class Scoring(ScoringSummary):
    """What sweeps and evaluations have in common."""

    failures: list[FailedAttempt] = Field(description="The attempts that failed, in order; hand-backs are none")
    retry_at: datetime | None = Field(description="While queued after a failure: the next attempt begins no sooner")
    webhook: WebhookDocument | None = Field(description="Who is told when it ends")
    tasks: list[dict[str, Any]] = Field(description="Every default written out, every file by its digest")
    estimates: dict[str, int]
    warnings: list[ProblemItem]


class Evaluation(Scoring):
    """Scores of a model as it is."""

    model: str = Field(description="As submitted")
    scores: list[Score] = Field(description="In the order of the tasks; empty until it has succeeded")

    @classmethod
    def of(cls, job: Job, points: Sequence[Point]) -> Evaluation:
        (point,) = points
        return cls(**_scoring(job), model=job.recipe["model"], scores=_scores(point) or [])


class SweepPoint(Document):
    """A point of the grid."""

    number: int = Field(description="From 0 in the order of the axes, the last one fastest")
    settings: dict[str, Any]
    scores: list[Score] | None = Field(description="In the order of the tasks; null until it is scored")
    kept: dict[str, float | None] = Field(
        description="By task whose model is known: the share of that model's gain over the base that this point keeps; "
        "null where it gained nothing"
    )
    mean: float | None = Field(description="Of `kept`")
    minimum: float | None = Field(description="Of `kept`")
    scored_at: datetime | None


class HeldAgainst(Document):
    """What points are held against: `base`, or `model N alone`."""

    name: str
    scores: list[Score] | None


class Sweep(Scoring):
    """One recipe over a grid, every point scored on tasks."""

    recipe: dict[str, Any] = Field(description="As submitted")
    grid: dict[str, list[Any]]
    against: list[HeldAgainst]
    points: list[SweepPoint]
    best: int | None = Field(
        description="Of the points that are scored, the number of the one that keeps most in the mean; where no task "
        "names its model, of the one with the best mean score"
    )

    @classmethod
    def of(cls, job: Job, points: Sequence[Point]) -> Sweep:
        rows = sweep_rows(job, points)
        by_name = {row.name: row for row in rows}
        return cls(
            **_scoring(job),
            recipe=dict(job.recipe["recipe"]),
            grid=job.recipe["grid"],
            against=[HeldAgainst(name=point.name, scores=_scores(point)) for point in points if point.settings is None],
            points=[_point(number, point, by_name.get(point.name)) for number, point in enumerate(in_grid(points))],
            best=best_point(rows, points),
        )


def in_grid(points: Sequence[Point]) -> list[Point]:
    """The points of the grid, in its order: that of their numbers in the API."""
    return [point for point in points if point.settings is not None]


def best_point(rows: Sequence[Row], points: Sequence[Point]) -> int | None:
    """The number in the grid of the best one that is scored."""
    best = best_of(rows)
    names = [point.name for point in in_grid(points)]
    return None if best is None else names.index(rows[best].name)


def sweep_rows(job: Job, points: Sequence[Point]) -> list[Row]:
    """What the points that are scored say. What they are held against is scored before any of them."""
    scored = [
        Scored(name=point.name, settings=point.settings, scores=point.scores)
        for point in points
        if point.scores is not None
    ]
    return rows_of(scored, [task.get("source") for task in job.resolved["tasks"]])


def _point(number: int, point: Point, row: Row | None) -> SweepPoint:
    return SweepPoint(
        number=number,
        settings=dict(point.settings or {}),
        scores=_scores(point),
        kept={} if row is None else dict(row.kept),
        mean=None if row is None else row.mean,
        minimum=None if row is None else row.minimum,
        scored_at=point.scored_at,
    )


def _scores(point: Point) -> list[Score] | None:
    return None if point.scores is None else [Score(**asdict(score)) for score in point.scores]


def _scoring(job: Job) -> dict[str, Any]:
    return {**_summary(job), **job_details(job), "tasks": job.resolved["tasks"]}


def _summary(job: Listed) -> dict[str, Any]:
    url, total = job_url(job), job.total_bytes
    done = total if job.status is Status.SUCCEEDED else min(job.progress_bytes, total)
    return {
        **job_summary(job),
        "progress": PointProgress(
            points_done=done // POINT_UNITS, points_total=total // POINT_UNITS, fraction=done / total
        ),
        "urls": ScoringUrls(self=url, events=f"{url}/events", cancel=f"{url}/cancel"),
    }
