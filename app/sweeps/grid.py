"""A recipe and a grid → every point as a recipe of its own, so that a point's checkpoint is made like any other."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import MergeyardError
from app.recipe.methods import METHODS

MAX_POINTS = 1_000
MAX_AXES = 20
OF_SOURCE = re.compile(r"models\[(\d{1,3})\]\.(\w{1,64})", re.ASCII)
NAME = re.compile(r"\w{1,64}", re.ASCII)

KEPT = ("base_model", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")

Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a grid, ``number`` from 0 in the order of its axes, the last one fastest.

    ``settings`` are the axes' values here; ``recipe`` is what is merged, as if somebody had written it.
    """

    number: int
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]


def expand(recipe: Mapping[str, Any], axes: Axes) -> tuple[Point, ...]:
    """Every point of the grid. ``recipe`` is one document with ``models``; what it says of an axis is replaced.

    An axis is ``merge_method``, ``dialect`` or another parameter of the whole merge, a parameter of every source
    (``density``, ``weight``), or of one (``models[0].weight``).

    Raises:
        MergeyardError: `grid_invalid`, with its place: an axis that no recipe has, no values or one twice, more than
            MAX_POINTS points (told by their number, none of them made).
    """
    if not isinstance(recipe.get("models"), list) or not recipe["models"]:
        message = "A sweep takes a recipe with `models`, one document; slices, modules and documents cannot be swept."
        raise MergeyardError("grid_invalid", message)
    if not 0 < len(axes) <= MAX_AXES:
        raise MergeyardError("grid_invalid", f"A grid has 1 to {MAX_AXES} axes.", where="grid")
    for name, values in axes.items():
        _check_axis(name, values, len(recipe["models"]))
    count = math.prod(len(values) for values in axes.values())
    if count > MAX_POINTS:
        message = f"The grid has {count} points; at most {MAX_POINTS} are scored in one sweep. Take values out of it."
        raise MergeyardError("grid_invalid", message, where="grid")
    chosen = itertools.product(*axes.values())
    return tuple(
        Point(
            number=number,
            settings=dict(zip(axes, values, strict=True)),
            recipe=_at(recipe, dict(zip(axes, values, strict=True))),
        )
        for number, values in enumerate(chosen)
    )


def only_source(recipe: Mapping[str, Any], index: int, weight: float = 1.0) -> dict[str, Any]:
    """The base with one of the recipe's sources on it, as it was trained (``weight`` 1), or the base alone (0)."""
    entry = {key: value for key, value in recipe["models"][index].items() if key != "parameters"}
    kept = {key: recipe[key] for key in KEPT if key in recipe}
    return {**kept, "merge_method": "task_arithmetic", "models": [{**entry, "parameters": {"weight": weight}}]}


def _check_axis(name: str, values: Any, sources: int) -> None:
    if not isinstance(values, list | tuple) or not values:
        raise _wrong(name, f"`{name[:80]}` needs a list of values.")
    if any(isinstance(value, Mapping | list | tuple) or value is None for value in values):
        raise _wrong(name, f"The values of `{name[:80]}` are numbers, names, or true and false.")
    if len({(type(value) is bool, value) for value in values}) < len(values):
        raise _wrong(name, f"`{name[:80]}` has a value twice.")
    if own := OF_SOURCE.fullmatch(name):
        if int(own[1]) >= sources:
            raise _wrong(name, f"`{name}`: the recipe has {sources} models, counted from 0.")
    elif not NAME.fullmatch(name):
        raise _wrong(name, f"`{name[:80]}` is no axis; write merge_method, a parameter, or models[0].PARAMETER.")


def _wrong(name: str, message: str) -> MergeyardError:
    return MergeyardError("grid_invalid", message, where=f"grid.{name[:80]}")


def _at(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy({key: value for key, value in recipe.items() if key != "evaluation"})
    if "merge_method" in settings:
        made["merge_method"] = settings["merge_method"]
    spec = METHODS.get(str(made.get("merge_method")))
    for name, value in settings.items():
        if name == "merge_method":
            continue
        if own := OF_SOURCE.fullmatch(name):
            _set(made["models"][int(own[1])], own[2], value)
            continue
        parameter = spec.parameters.get(name) if spec else None
        if parameter is None or not parameter.per_source:  # what the method has not is for the parser to tell
            _set(made, name, value)
            continue
        for entry in made["models"]:
            _set(entry, name, value)
    return made


def _set(entry: dict[str, Any], name: str, value: Any) -> None:
    entry["parameters"] = {**(entry.get("parameters") or {}), name: value}
