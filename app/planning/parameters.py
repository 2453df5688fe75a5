"""A recipe's parameters → the settings of one source, or of one tensor.

Parameters come in levels, the most specific first (source, slice, module, recipe): the first that says something about
a tensor wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.planning.plan import Scalar
from app.recipe.methods import DIALECTS, METHODS
from app.recipe.values import Position, value_at

Levels = tuple[Mapping[str, Any], ...]  # parameters, the most specific first


def source_parameters(method: str, levels: Levels, position: Position) -> Mapping[str, float]:
    """What one source uses at one tensor: ``weight``, and ``density`` where the method trims."""
    return {
        name: float(_setting(name, levels, parameter.default, position))
        for name, parameter in METHODS[method].parameters.items()
        if parameter.per_source and not parameter.ignored
    }


def tensor_parameters(method: str, levels: Levels, position: Position) -> Mapping[str, Scalar]:
    """What the method uses at one tensor, with the dialect resolved into single choices (see TensorPlan)."""
    values: dict[str, Scalar] = {}
    for name, parameter in METHODS[method].parameters.items():
        if not (parameter.per_source or parameter.ignored):
            setting = _setting(name, levels, parameter.default, position)
            if setting is not None:
                values[name] = setting
    if method == "linear":
        values["lambda"] = 1.0
    if "dialect" in values:
        _settle_dialect(values)
    if "inner" in values:
        _settle_inner(values)
    return values


def elects_signs(method: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a source that leaves a tensor as it is takes no part there; else it counts, with δ = 0."""
    return METHODS[method].sign_elected and parameters.get("inner", "ties") == "ties"


def _settle_dialect(values: dict[str, Scalar]) -> None:
    """The dialect's choices, below those that the recipe makes by themselves."""
    dialect = DIALECTS[str(values.pop("dialect"))]
    chosen = dict(values)
    values |= {
        "trim_scope": dialect.trim_scope,
        "elect": dialect.elect,
        "min_keep": dialect.min_keep,
        "weights": dialect.weights,
        "divisor": dialect.divisor,
        "zero_sum": dialect.zero_sum,
        **chosen,
    }


def _settle_inner(values: dict[str, Scalar]) -> None:
    """The wrapped method's own default, and nothing that it does not know."""
    values.setdefault("normalize", values["inner"] != "task_arithmetic")
    if values["inner"] != "ties":
        for name in set(values) - {"inner", "lambda", "normalize"}:
            del values[name]


def _setting(name: str, levels: Levels, default: Any, position: Position) -> Any:
    """The first level that says something about this tensor; filters of which none matches say nothing."""
    for level in levels:
        if name in level:
            value = value_at(level[name], position)
            if value is not None:
                return value
    return default
