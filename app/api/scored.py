"""What the API answers about sweeps and evaluations: one model a document, made from the records' frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import Field

from app.api.schemas import (
    Document,
    FailedAttempt,
    Failure,
    ProblemItem,
    Score,
    WebhookDocument,
    failure_of,
)
from app.records.job import POINT_UNITS, Job, Listed, Point, Stage, Status
from app.sweeps.planning import BASE
from app.sweeps.results import Row, Scored, best_of, rows_of
from app.tasks.task import TaskScore


class PointProgress(Document):
    """What is scored: the base, models by themselves, and points. ``fraction`` is between 0 and 1."""

    points_done: int
    points_total: int
    fraction: float


class ScoringUrls(Document):
    self: str
    events: str
    cancel: str


class ScoringSummary(Document):
    """A sweep or an evaluation as lists show it."""

    id: str
    kind: str
    owner: str = Field(description="Whose key submitted it; `local` while there were no keys")
    status: Status
    stage: Stage | None
    method: str
    queue: str
    priority: int
    labels: dict[str, str]
    attempt: int
    max_attempts: int
    progress: PointProgress
    error: Failure | None
    pinned: bool = Field(description="It does not expire")
    expires_at: datetime | None = Field(description="When it will be deleted, unless it is pinned")
    fingerprint: str = Field(description="sha256 over everything that is merged and everything that is asked")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    urls: ScoringUrls

    @classmethod
    def listed(cls, job: Listed) -> ScoringSummary:
        return cls(**_summary(job))


class ScoringPage(Document):
    """One page, newest first. ``next_cursor`` is null on the last page."""

    items: list[ScoringSummary]
    next_cursor: str | None


class _Scoring(ScoringSummary):
    failures: list[FailedAttempt] = Field(description="The attempts that failed, in order; hand-backs are none")
    retry_at: datetime | None = Field(description="While queued after a failure: the next attempt begins no sooner")
    webhook: WebhookDocument | None = Field(description="Who is told when it ends")
    tasks: list[dict[str, Any]] = Field(description="Every default written out, every file by its digest")
    estimates: dict[str, int]
    warnings: list[ProblemItem]


class Evaluation(_Scoring):
    """Scores of a model as it is."""

    model: str = Field(description="As submitted")
    scores: list[Score] = Field(description="In the order of the tasks; empty until it has succeeded")

    @classmethod
    def of(cls, job: Job, points: Sequence[Point]) -> Evaluation:
        scores = points[0].scores if points else None
        return cls(
            **_scoring(job),
            model=job.recipe["model"],
            scores=[Score(**score) for score in scores or ()],
        )


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


class Sweep(_Scoring):
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
        in_grid = [point for point in points if point.settings is not None]
        best = best_of(rows)
        numbers = {point.name: number for number, point in enumerate(in_grid)}
        return cls(
            **_scoring(job),
            recipe=dict(job.recipe["recipe"]),
            grid=job.recipe["grid"],
            against=[HeldAgainst(name=point.name, scores=_scores(point)) for point in points if point.settings is None],
            points=[_point(number, point, by_name.get(point.name)) for number, point in enumerate(in_grid)],
            best=None if best is None else numbers[rows[best].name],
        )


def sweep_rows(job: Job, points: Sequence[Point]) -> list[Row]:
    """What the points that are scored say."""
    scored = [
        Scored(name=point.name, settings=point.settings, scores=tuple(TaskScore(**score) for score in point.scores))
        for point in points
        if point.scores is not None
    ]
    if not any(one.name == BASE for one in scored):
        return []
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
    return None if point.scores is None else [Score(**score) for score in point.scores]


def _scoring(job: Job) -> dict[str, Any]:
    return {
        **_summary(job),
        "failures": [FailedAttempt(**failure) for failure in job.failures],
        "retry_at": job.retry_at,
        "webhook": None if job.webhook is None else WebhookDocument(**job.webhook),
        "tasks": job.resolved["tasks"],
        "estimates": dict(job.estimates),
        "warnings": [ProblemItem(**warning) for warning in job.warnings],
    }


def _summary(job: Listed) -> dict[str, Any]:
    url = scoring_url(job)
    total = max(1, job.total_bytes)
    done = total if job.status is Status.SUCCEEDED else min(job.progress_bytes, total)
    return {
        "id": job.id,
        "kind": job.kind,
        "owner": job.owner,
        "status": job.status,
        "stage": job.stage,
        "method": job.method,
        "queue": job.queue,
        "priority": job.priority,
        "labels": dict(job.labels),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "progress": PointProgress(
            points_done=done // POINT_UNITS, points_total=job.total_bytes // POINT_UNITS, fraction=done / total
        ),
        "error": failure_of(job.error),
        "pinned": job.pinned,
        "expires_at": None if job.pinned else job.expires_at,
        "fingerprint": job.plan_digest,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "updated_at": job.updated_at,
        "urls": ScoringUrls(self=url, events=f"{url}/events", cancel=f"{url}/cancel"),
    }


def scoring_url(job: Listed) -> str:
    return f"/{job.kind}s/{job.id}"
