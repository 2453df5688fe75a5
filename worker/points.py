"""The work of a sweep or an evaluation: every point that has no scores yet is merged in memory, scored and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.job import POINT_UNITS, Job, Point, Stage
from app.records.points import Points
from app.sources.resolver import Resolver
from app.sweeps.planning import plan_tasks_again
from app.tasks.task import TaskScore
from worker.engine.kernels.signature import Kernels
from worker.evaluation.sweep import score_points
from worker.lease import Lease

Fetch = Callable[[Plan], None]  # brings here what a plan reads and this machine has not yet, of one place


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What the points of a job are scored with. ``resolver`` makes a new one, which sees what is here by now."""

    points: Points
    resolver: Callable[[], Resolver]
    fetch: Fetch
    kernels: Kernels
    threads: int

    def run(self, job: Job, lease: Lease) -> None:
        """Score what is not scored. Raises MergeyardError, and what ``lease.check`` raises."""
        known = lease.persist(lambda: self.points.of(job.id))
        missing = [point for point in known if point.scores is None]
        watch = _Watch(lease, done=len(known) - len(missing), total=len(known))
        if not missing:
            return
        first = self._plan(missing[0], lease)
        tasks = lease.persist(lambda: plan_tasks_again(job.resolved["tasks"], first, self.resolver()))
        lease.stage(Stage.EVALUATING)
        waiting = iter(missing)

        def keep(scores: tuple[TaskScore, ...]) -> None:
            number = next(waiting).number
            lease.persist(lambda: self.points.record(job.id, lease.token, number, scores))
            watch.next()

        plans = self._plans(missing, first, lease)
        score_points(plans, tasks, kernels=self.kernels, watch=watch, on_scored=keep, threads=self.threads)

    def _plans(self, missing: Sequence[Point], first: Plan, lease: Lease) -> Iterator[Plan]:
        yield first
        for point in missing[1:]:
            yield self._plan(point, lease)

    def _plan(self, point: Point, lease: Lease) -> Plan:
        """The point's plan, with everything it reads on this machine."""
        while (plan := lease.persist(lambda: _plan_again(point, self.resolver()))).remote:
            lease.stage(Stage.DOWNLOADING)
            self.fetch(plan)
        return plan


class _Watch:
    """A ``Watch`` whose progress is that of the whole job, in thousandths of a point."""

    def __init__(self, lease: Lease, *, done: int, total: int) -> None:
        self._lease, self._done, self._total = lease, done, total
        self.scoring(0.0)

    def next(self) -> None:
        """A point is recorded."""
        self._done += 1
        self.scoring(0.0)

    def scoring(self, share: float) -> None:
        self._lease.progress(POINT_UNITS * self._done + int(POINT_UNITS * share), POINT_UNITS * self._total)

    def stage(self, name: str) -> None:
        """Every point has all of a merge's; the job is being scored."""

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """Merging a point is the smaller part of it; what counts is its scoring."""

    def scored(self, score: TaskScore) -> None:
        """One task of a point; what is told are points."""

    def check(self) -> None:
        self._lease.check()


def _plan_again(point: Point, resolver: Resolver) -> Plan:
    """The plan, made from the files as they are now. Raises ``source_changed`` unless it is the submitted one."""
    plan = make_plan(parse_recipe(point.resolved), resolver)
    if plan.digest != point.plan_digest:
        message = "A source's files, or Mergeyard's version, are not those that were planned with; submit it again."
        raise MergeyardError("source_changed", message)
    return plan
