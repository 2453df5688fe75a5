"""A recipe's parameters → the settings of one source, or of one tensor. Precedence: source, then the whole recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.planning.plan import Scalar
from app.recipe import Recipe, SourceEntry
from app.recipe.methods import DIALECTS, METHODS
from app.recipe.values import Position, value_at


def source_parameters(recipe: Recipe, entry: SourceEntry, position: Position) -> Mapping[str, float]:
    """What one source uses at one tensor: ``weight``, and ``density`` where the method trims."""
    return {
        name: float(_setting(name, (entry.parameters, recipe.parameters), parameter.default, position))
        for name, parameter in METHODS[recipe.merge_method].parameters.items()
        if parameter.per_source and not parameter.ignored
    }


def tensor_parameters(recipe: Recipe, position: Position) -> Mapping[str, Scalar]:
    """What the method uses at one tensor, with the dialect resolved into single choices (see TensorPlan)."""
    values: dict[str, Scalar] = {}
    for name, parameter in METHODS[recipe.merge_method].parameters.items():
        if not (parameter.per_source or parameter.ignored or name == "dialect"):
            setting = _setting(name, (recipe.parameters,), parameter.default, position)
            if setting is not None:
                values[name] = setting
    if recipe.merge_method == "linear":
        values["lambda"] = 1.0
    if recipe.merge_method == "ties":
        dialect = DIALECTS[str(recipe.parameters.get("dialect", "mergekit"))]
        values = {
            "trim_scope": dialect.trim_scope,
            "elect": dialect.elect,
            "min_keep": dialect.min_keep,
            "weights": dialect.weights,
            "divisor": dialect.divisor,
            "zero_sum": dialect.zero_sum,
            **values,
        }
    return values


def _setting(name: str, levels: tuple[Mapping[str, Any], ...], default: Any, position: Position) -> Any:
    """The first level that says something about this tensor; filters of which none matches say nothing."""
    for level in levels:
        if name in level:
            value = value_at(level[name], position)
            if value is not None:
                return value
    return default
