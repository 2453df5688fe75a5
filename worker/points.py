"""The work of a sweep or an evaluation: every point that has no scores yet is merged in memory, scored and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.planning.plan import Plan
from app.records.job import POINT_UNITS, Job, Stage, Unscored
from app.records.points import Points
from app.sources.resolver import Resolver
from app.sweeps.planning import plan_tasks_again
from app.tasks.task import TaskScore
from worker.engine.kernels.signature import Kernels
from worker.evaluation.sweep import score_points
from worker.lease import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What the points of a job are scored with.

    ``plan``: of a resolved recipe and the digest that its plan had, the plan, with all that it reads on this machine.
    ``resolver`` makes a new one, which sees what is here by now.
    """

    points: Points
    plan: Callable[[Mapping[str, Any], str], Plan]
    resolver: Callable[[], Resolver]
    kernels: Kernels
    threads: int

    def run(self, job: Job, lease: Lease) -> None:
        """Score what is not scored. Raises MergeyardError, and what ``lease.check`` raises."""
        missing = lease.persist(lambda: self.points.unscored(job.id))
        watch = _Watch(lease, job.total_bytes, missing=len(missing))
        if not missing:
            return
        first = self.plan(missing[0].resolved, missing[0].plan_digest)
        tasks = lease.persist(lambda: plan_tasks_again(job.resolved["tasks"], first, self.resolver()))
        lease.stage(Stage.EVALUATING)

        def keep(point: Unscored, scores: tuple[TaskScore, ...]) -> None:
            lease.persist(lambda: self.points.record(job.id, lease.token, point.number, scores))
            watch.next()

        points = self._planned(missing, first)
        score_points(points, tasks, kernels=self.kernels, watch=watch, on_scored=keep, threads=self.threads)

    def _planned(self, missing: Sequence[Unscored], first: Plan) -> Iterator[tuple[Unscored, Plan]]:
        """One by one: a plan of a large model is large itself."""
        yield missing[0], first
        for point in missing[1:]:
            yield point, self.plan(point.resolved, point.plan_digest)


class _Watch:
    """A ``Watch`` whose progress is that of the whole job, in thousandths of a point."""

    def __init__(self, lease: Lease, whole: int, *, missing: int) -> None:
        self._lease, self._whole = lease, whole
        self._done = whole - POINT_UNITS * missing
        self.scoring(0.0)

    def next(self) -> None:
        """A point is recorded."""
        self._done += POINT_UNITS
        self.scoring(0.0)

    def scoring(self, share: float) -> None:
        self._lease.progress(self._done + int(POINT_UNITS * share), self._whole)

    def stage(self, name: str) -> None:
        """Every point has all of a merge's; the job is being scored."""

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """Merging a point is the smaller part of it; what counts is its scoring."""

    def scored(self, score: TaskScore) -> None:
        """One task of a point; what is told are points."""

    def check(self) -> None:
        self._lease.check()
