"""A plan's tasks, scored on the checkpoint that the engine has just written."""

from __future__ import annotations

from pathlib import Path

from app.planning.plan import Plan
from app.tasks.task import TaskScore
from worker.engine.meter import Control
from worker.engine.run import Evaluate
from worker.evaluation.loading import loaded
from worker.evaluation.scoring import score


def evaluator(plan: Plan, room: str) -> Evaluate | None:
    """What scores the result of ``plan``; None where it names no tasks. ``room``: that of the kernels."""
    if not plan.tasks:
        return None
    device = "cuda" if room == "cuda" else "cpu"

    def evaluate(folder: Path, control: Control, /) -> tuple[TaskScore, ...]:
        scores = []
        with loaded(folder, device) as model:
            for planned in plan.tasks:
                found = score(model, planned.task, check=control.check)
                control.scored(found)
                scores.append(found)
        return tuple(scores)

    return evaluate
