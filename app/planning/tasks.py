"""The tasks that a recipe names → their examples, pinned, or every problem with its place."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any

from app.errors import MergeyardError, Problem
from app.planning.plan import PlannedTask
from app.recipe import Recipe
from app.recipe.evaluation import LONGEST_NAME, TaskEntry
from app.sources.resolver import Resolver
from app.tasks.reading import read_examples
from app.tasks.task import Task

MAX_BYTES = 100_000_000  # of all files of a recipe: they are read whole, as often as it is planned


def plan_tasks(recipe: Recipe, resolver: Resolver, *, has_chat_template: bool) -> tuple[PlannedTask, ...]:
    """Read every task of ``recipe.evaluation``.

    Raises:
        MergeyardError: with every problem: `task_invalid`, `source_not_found`, `path_outside_roots`,
            `reference_invalid`, `source_changed` (a ``sha256`` that the file has not), `chat_template_missing`,
            `not_supported` (an adapter is not scored).
    """
    if recipe.evaluation is None:
        return ()
    if recipe.output.kind == "adapter":
        message = "An adapter is not scored by itself yet; merge into a checkpoint, or leave `evaluation` out."
        raise MergeyardError("not_supported", message, where="evaluation")
    return read_tasks(recipe.evaluation.tasks, resolver, "evaluation.tasks", has_chat_template=has_chat_template)


def read_tasks(
    entries: Sequence[TaskEntry], resolver: Resolver, where: str, *, has_chat_template: bool
) -> tuple[PlannedTask, ...]:
    """The tasks of a list that stands at ``where``. Raises as ``plan_tasks``."""
    problems: list[Problem] = []
    planned: list[PlannedTask] = []
    size = 0
    for index, entry in enumerate(entries):
        taken = {item.task.name for item in planned}
        try:
            reference, content = resolver.task_file(entry.file)
            size += len(content)
            if size > MAX_BYTES:
                raise MergeyardError("task_invalid", f"The task files have more than {MAX_BYTES} bytes together.")
            planned.append(_planned(entry, reference, content, taken, has_chat_template=has_chat_template))
        except MergeyardError as error:
            key = "sha256" if error.code == "source_changed" else "file"
            problems.append(Problem(code=error.code, message=error.message, where=f"{where}[{index}].{key}"))
    for name, count in Counter(item.task.name for item in planned).items():
        if count > 1:
            message = f"{count} tasks are called {name}; give them a `name` each."
            problems.append(Problem(code="recipe_invalid", message=message, where=where))
    if problems:
        raise MergeyardError.of(problems)
    return tuple(planned)


def section(tasks: Sequence[PlannedTask]) -> dict[str, Any]:
    """``evaluation`` as the resolved recipe has it: every default written out, every file by its digest."""
    return {
        "tasks": [
            {
                "name": item.task.name,
                "file": item.reference,
                "metric": item.task.metric,
                **({} if item.limit is None else {"limit": item.limit}),
                "max_new_tokens": item.task.max_new_tokens,
                "sha256": item.sha256,
            }
            for item in tasks
        ]
    }


def _name_of(reference: str, entry: TaskEntry, taken: Collection[str]) -> str:
    """After the file, as far as a name may be; where that is taken already, with the metric."""
    stem = PurePosixPath(reference.partition(":")[2] or reference).stem
    name = re.sub(r"[^\w.-]", "-", stem)[: LONGEST_NAME - len(entry.metric) - 1]
    return f"{name}-{entry.metric}" if name in taken else name


def _planned(
    entry: TaskEntry, reference: str, content: bytes, taken: Collection[str], *, has_chat_template: bool
) -> PlannedTask:
    sha256 = hashlib.sha256(content).hexdigest()
    if entry.sha256 not in (None, sha256):
        raise MergeyardError("source_changed", f"{entry.file} is not the file with the digest {entry.sha256}.")
    name = entry.name or _name_of(reference, entry, taken)
    examples = read_examples(content, name=entry.file, metric=entry.metric, limit=entry.limit)
    task = Task(name=name, metric=entry.metric, examples=examples, max_new_tokens=entry.max_new_tokens)
    if task.chats and not has_chat_template:
        message = f"{entry.file} has `messages`, and the result's tokenizer has no chat template; set `chat_template`."
        raise MergeyardError("chat_template_missing", message)
    return PlannedTask(task=task, reference=reference, sha256=sha256, limit=entry.limit)
