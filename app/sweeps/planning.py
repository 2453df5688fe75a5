"""What a sweep or an evaluation scores, planned: every point as a merge of its own, and the tasks.

All of it is planned before anything is queued or computed, so that what is wrong with the last point is told first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from app.errors import MergeyardError, Problem
from app.planning.output import has_chat_template, scoring_bytes
from app.planning.plan import Estimates, Plan, PlannedTask
from app.planning.planner import make_plan
from app.planning.tasks import read_tasks, section
from app.recipe import parse_recipe
from app.recipe.evaluation import TaskEntry
from app.sources.references import split_adapter
from app.sources.resolver import Resolver
from app.sweeps.grid import Axes, expand, only_source

BASE = "base"


class SweptTask(TaskEntry):
    """A task of a sweep, and which of the recipe's models was trained for it."""

    source: int | None = Field(
        None, ge=0, lt=1000, strict=True, description="The number of the model it belongs to, from 0"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPoint:
    """What is merged and scored: a point of the grid, or (``settings`` None) something that points are held against.

    ``recipe`` is as somebody would have written it, ``resolved`` and the rest are of its plan. The plan itself is made
    again by whoever scores the point: those of a thousand points would fill the memory.
    """

    name: str
    settings: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    resolved: Mapping[str, Any]
    plan_digest: str
    method: str
    estimates: Estimates
    warnings: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSweep:
    """Everything that is scored, in this order, and on what. ``sources``: of each task, the model it belongs to."""

    points: tuple[PlannedPoint, ...]
    tasks: tuple[PlannedTask, ...]
    sources: tuple[int | None, ...]

    @property
    def digest(self) -> str:
        """sha256 hex over all that is merged and what is asked."""
        return _digest([point.plan_digest for point in self.points], self.tasks)

    def key_of(self, point: PlannedPoint) -> str:
        """sha256 hex, the same for the same merge and the same tasks."""
        return _digest(point.plan_digest, self.tasks)

    @property
    def peak_memory_bytes(self) -> int:
        """The model that becomes every point, and the largest point's merge into it."""
        estimates = [point.estimates for point in self.points]
        return max(map(scoring_bytes, estimates)) + max(one.peak_memory_bytes for one in estimates)

    @property
    def resolved_tasks(self) -> list[dict[str, Any]]:
        """The tasks with every default written out and every file by its digest."""
        entries = section(self.tasks)["tasks"]
        return [
            entry if source is None else {**entry, "source": source}
            for entry, source in zip(entries, self.sources, strict=True)
        ]


def alone(index: int) -> str:
    """What a source by itself, on the base, is called."""
    return f"model {index} alone"


def plan_sweep(
    recipe: Mapping[str, Any], axes: Axes, tasks: Sequence[SweptTask], resolver: Resolver, *, where: str = "tasks"
) -> PlannedSweep:
    """The base, each source that a task belongs to, and every point of the grid.

    ``recipe``: as ``Recipe.as_sent`` has it. ``where``: the place of the tasks.

    Raises:
        MergeyardError: `grid_invalid`, what `read_tasks` raises, and of the first point that cannot be planned what
            `make_plan` raises, with the point's settings.
    """
    resolver = replace(resolver, read={})
    points = expand(recipe, axes)
    count = len(recipe["models"])
    if wrong := [place for place, task in enumerate(tasks) if task.source is not None and task.source >= count]:
        message = f"The recipe has {count} models, counted from 0."
        raise MergeyardError("task_invalid", message, where=f"{where}[{wrong[0]}].source")
    owners = sorted({task.source for task in tasks if task.source is not None})
    base, plan = _planned(BASE, None, only_source(recipe, 0, 0.0), resolver)
    read = _tasks(tasks, plan, resolver, where)
    rest = [
        *((alone(index), None, only_source(recipe, index)) for index in owners),
        *((f"point {point.number}", point.settings, point.recipe) for point in points),
    ]
    planned = [_planned(*one, resolver)[0] for one in rest]
    return PlannedSweep(points=(base, *planned), tasks=read, sources=tuple(task.source for task in tasks))


def plan_evaluation(model: str, tasks: Sequence[TaskEntry], resolver: Resolver) -> PlannedSweep:
    """A model as it is; ``BASE+ADAPTER`` is their merge. Raises MergeyardError as `make_plan` and `read_tasks` do."""
    base, adapter = split_adapter(model)
    recipe: dict[str, Any] = (
        {"merge_method": "passthrough", "models": [{"model": model}]}
        if adapter is None
        else {"base_model": base, "merge_method": "task_arithmetic", "models": [{"adapter": adapter}]}
    )
    try:
        point, plan = _planned(model, None, recipe, resolver)
    except MergeyardError as error:
        raise MergeyardError.of([replace(problem, where="model") for problem in error.problems]) from None
    read = _tasks(tasks, plan, resolver, "tasks")
    return PlannedSweep(points=(point,), tasks=read, sources=(None,) * len(read))


def plan_tasks_again(entries: Sequence[Mapping[str, Any]], plan: Plan, resolver: Resolver) -> tuple[PlannedTask, ...]:
    """The tasks of ``PlannedSweep.resolved_tasks``, from their files as they are now."""
    return _tasks([SweptTask(**entry) for entry in entries], plan, resolver, "tasks")


def _tasks(entries: Sequence[TaskEntry], plan: Plan, resolver: Resolver, where: str) -> tuple[PlannedTask, ...]:
    template = has_chat_template(plan.documents, plan.companions, plan.base.reference)
    return read_tasks(entries, resolver, where, has_chat_template=template)


def _planned(
    name: str, settings: Mapping[str, Any] | None, recipe: Mapping[str, Any], resolver: Resolver
) -> tuple[PlannedPoint, Plan]:
    try:
        plan = make_plan(parse_recipe(recipe), resolver)
        if plan.earlier:
            message = "A recipe that makes other models on its way cannot be scored in memory; merge those first."
            raise MergeyardError("not_supported", message)
    except MergeyardError as error:
        raise MergeyardError.of([_at_point(problem, settings) for problem in error.problems]) from None
    point = PlannedPoint(
        name=name,
        settings=settings,
        recipe=recipe,
        resolved=plan.recipe,
        plan_digest=plan.digest,
        method=plan.method,
        estimates=plan.estimates,
        warnings=plan.warnings,
    )
    return point, plan


def _digest(merged: object, tasks: Sequence[PlannedTask]) -> str:
    text = json.dumps([merged, section(tasks)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _at_point(problem: Problem, settings: Mapping[str, Any] | None) -> Problem:
    if not settings:
        return problem
    at = ", ".join(f"{name}={value}" for name, value in settings.items())
    return replace(problem, message=f"At {at}: {problem.message}")
