"""Points of a sweep, one after the other: each is merged into one model in memory and scored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from app.planning.plan import Plan, PlannedTask
from app.tasks.task import TaskScore
from worker.engine.digests import DigestCache
from worker.engine.kernels.signature import Kernels
from worker.engine.meter import Control
from worker.evaluation.memory import ModelInMemory
from worker.evaluation.scoring import score

Point = TypeVar("Point")


class Watch(Control, Protocol):
    """A Control that is also told how far the scoring of a point is, from 0 to 1."""

    def scoring(self, share: float) -> None: ...


def score_points(
    points: Iterable[tuple[Point, Plan]],
    tasks: Sequence[PlannedTask],
    *,
    kernels: Kernels,
    watch: Watch,
    on_scored: Callable[[Point, tuple[TaskScore, ...]], None],
    threads: int = 0,
) -> None:
    """Score every plan's result. ``points``: whatever the caller knows each by, with its plan; one is asked for once
    ``on_scored`` was told of the one before it, so that whoever keeps the scores loses none.

    Raises MergeyardError as ``ModelInMemory`` and ``score`` do, or what ``watch.check`` raises.
    """
    with tempfile.TemporaryDirectory(prefix="mergeyard-sweep-") as scratch:
        # Sources are hashed once and not at every point.
        digests = DigestCache(Path(scratch) / "digests")
        model: ModelInMemory | None = None
        for point, plan in points:
            watch.check()
            if model is None:
                (folder := Path(scratch) / "model").mkdir()
                model = ModelInMemory(plan, folder, "cuda" if kernels.name == "cuda" else "cpu")
            model.become(plan, kernels=kernels, control=watch, digests=digests, threads=threads)
            on_scored(point, tuple(_score(model, task, place, len(tasks), watch) for place, task in enumerate(tasks)))


def _score(model: ModelInMemory, task: PlannedTask, place: int, count: int, watch: Watch) -> TaskScore:
    return score(
        model.loaded,
        task.task,
        on_progress=lambda done, total: watch.scoring((place + done / total) / count),
        check=watch.check,
    )
