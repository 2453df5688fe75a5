"""Parameter values that vary by tensor: scalars, gradients over the layers, and lists chosen by name.

mergekit's reading (merging-maths, "Full-tensor reading of mergekit's grammar"): a gradient is interpolated linearly at
layer/(layers-1), and everything outside the layers takes its first value; of ``{filter, value}`` entries the first
whose filter is a part of the tensor's name wins, no filter or ``*`` matching all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import MergeyardError
from app.recipe.methods import Parameter, Setting

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Position:
    """A tensor's place: its name, its layer (None outside the layers), and how many layers the model has."""

    name: str
    layer: int | None
    layers: int

    @property
    def t(self) -> float:
        """Depth from 0 to 1; 0 for everything outside the layers."""
        return 0.0 if self.layer is None or self.layers < 2 else self.layer / (self.layers - 1)


def layer_of(name: str) -> int | None:
    """The layer index in a tensor's name, or None for embeddings, heads and final norms."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else None


def check_value(raw: Any, parameter: Parameter, where: str, name: str) -> Any:
    """The value in canonical form (numbers as float), or a `parameter_invalid` that says what is allowed."""
    if parameter.kind == "choice":
        if raw not in parameter.choices:
            raise _invalid(where, f"{name} is one of {', '.join(parameter.choices)}; got {shown(raw)}")
        return raw
    if parameter.kind == "whole":
        if isinstance(raw, bool) or not isinstance(raw, int) or not parameter.low <= raw <= parameter.high:
            allowed = f"between {parameter.low:.0f} and {parameter.high:.0f}"
            raise _invalid(where, f"{name} is one whole number {allowed}; got {shown(raw)}")
        return raw
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        if not raw:
            raise _invalid(where, f"{name} is an empty list; give a value, a gradient or filter entries")
        if any(isinstance(item, Mapping) for item in raw):
            return [_check_filter(item, parameter, f"{where}[{i}]", name) for i, item in enumerate(raw)]
        if parameter.kind != "number":
            raise _invalid(where, f"{name} is true or false; a gradient needs numbers")
        return [_check_scalar(item, parameter, f"{where}[{i}]", name) for i, item in enumerate(raw)]
    return _check_scalar(raw, parameter, where, name)


def value_at(value: Any, position: Position) -> Setting | None:
    """The setting of one tensor, or None where only filters were given and none matches. ``value`` is checked."""
    if isinstance(value, list):
        if isinstance(value[0], Mapping):
            for entry in value:
                wanted = entry.get("filter")
                if wanted is None or wanted == "*" or wanted in position.name:
                    return value_at(entry["value"], position)
            return None
        return _interpolate(value, position.t)
    return value  # type: ignore[no-any-return]


def _check_filter(item: Any, parameter: Parameter, where: str, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise _invalid(where, f"{name} mixes filter entries and plain numbers; use one or the other")
    for key in item:
        if key not in ("filter", "value"):
            raise _invalid(f"{where}.{key}", f"a filter entry has `filter` and `value`, not {key!r}")
    if "value" not in item:
        raise _invalid(where, "a filter entry needs a `value`")
    wanted = item.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise _invalid(f"{where}.filter", "a filter is a part of a tensor's name, or *")
    value = check_value(item["value"], parameter, f"{where}.value", name)
    if isinstance(value, list) and isinstance(value[0], Mapping):
        raise _invalid(f"{where}.value", "filter entries cannot be nested")
    return {"value": value} if wanted is None else {"filter": wanted, "value": value}


def _check_scalar(raw: Any, parameter: Parameter, where: str, name: str) -> Setting:
    if parameter.kind == "flag":
        if raw not in (True, False):  # 1.0 and 0 too: mergekit reads flags as numbers
            raise _invalid(where, f"{name} is true or false; got {shown(raw)}")
        return bool(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise _invalid(where, f"{name} is a number; got {shown(raw)}")
    if abs(raw) > 1e30 or not math.isfinite(number := float(raw)):
        raise _invalid(where, f"{name} must be a finite number")
    if not parameter.low <= number <= parameter.high:
        raise _invalid(where, f"{name} must lie between {parameter.low:g} and {parameter.high:g}; got {shown(raw)}")
    return number


def shown(raw: Any) -> str:
    """A user's value for a message, bounded."""
    return repr(raw)[:80]


def _interpolate(points: Sequence[float], t: float) -> float:
    if len(points) == 1:
        return points[0]
    scaled = t * (len(points) - 1)
    left = min(int(scaled), len(points) - 2)
    share = scaled - left
    return points[left] * (1.0 - share) + points[left + 1] * share


def _invalid(where: str, message: str) -> MergeyardError:
    return MergeyardError("parameter_invalid", message, where=where)
