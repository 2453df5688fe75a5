"""A sweep on this machine: every point merged into one model in memory and scored, but what was scored before."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.planning.plan import Plan, PlannedTask
from app.planning.tasks import section
from app.tasks.task import LOWER_IS_BETTER, TaskScore
from worker.engine.digests import DigestCache
from worker.engine.kernels.signature import Kernels
from worker.engine.meter import Control
from worker.evaluation.memory import ModelInMemory
from worker.evaluation.scoring import score


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTask:
    """A task, and the index of the source that was trained for it, where that is known."""

    planned: PlannedTask
    source: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is merged and scored: a point of the grid, or (``settings`` None) something that points are held against."""

    name: str
    settings: Mapping[str, Any] | None
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate's scores, in the order of the tasks. ``key`` is the same for the same merge and the same tasks."""

    name: str
    settings: Mapping[str, Any] | None
    key: str
    scores: tuple[TaskScore, ...]


class Watch(Control, Protocol):
    """A Control that is also told how far the scoring is: the candidate's number, and the share of it from 0 to 1."""

    def scoring(self, number: int, share: float) -> None: ...


def run_sweep(
    candidates: Sequence[Candidate],
    tasks: Sequence[SweepTask],
    *,
    known: Mapping[str, Sequence[TaskScore]],
    kernels: Kernels,
    watch: Watch,
    on_scored: Callable[[Scored], None],
    threads: int = 0,
) -> list[Scored]:
    """Score every candidate, in order. ``known``: scores by key, which are not made again; ``on_scored`` is told each
    of the others as soon as it is there, so that whoever keeps them loses none.

    Raises MergeyardError as ``ModelInMemory`` and ``score`` do, or what ``watch.check`` raises.
    """
    planned = [task.planned for task in tasks]
    found = []
    with tempfile.TemporaryDirectory(prefix="mergeyard-sweep-") as scratch:
        # Sources are hashed once and not at every point.
        digests = DigestCache(Path(scratch) / "digests")
        model: ModelInMemory | None = None
        for number, candidate in enumerate(candidates):
            key = key_of(candidate.plan, planned)
            if (scores := known.get(key)) is None:
                watch.check()
                if model is None:
                    (folder := Path(scratch) / "model").mkdir()
                    model = ModelInMemory(candidate.plan, folder, "cuda" if kernels.name == "cuda" else "cpu")
                model.become(candidate.plan, kernels=kernels, control=watch, digests=digests, threads=threads)
                scores = [_score(model, task, number, place, len(planned), watch) for place, task in enumerate(planned)]
            one = Scored(name=candidate.name, settings=candidate.settings, key=key, scores=tuple(scores))
            if key not in known:
                on_scored(one)
            found.append(one)
    return found


def key_of(plan: Plan, tasks: Sequence[PlannedTask]) -> str:
    """sha256 hex over what is merged and what is asked."""
    text = json.dumps([plan.digest, section(tasks)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def kept(found: TaskScore, base: TaskScore, own: TaskScore) -> float | None:
    """The share of a source's gain over the base that is kept; None where it gained nothing."""
    gain = own.score - base.score
    if (gain >= 0) == (found.metric in LOWER_IS_BETTER) or gain == 0:
        return None
    return (found.score - base.score) / gain


def _score(model: ModelInMemory, task: PlannedTask, number: int, place: int, count: int, watch: Watch) -> TaskScore:
    return score(
        model.loaded,
        task.task,
        on_progress=lambda done, total: watch.scoring(number, (place + done / total) / count),
        check=watch.check,
    )
