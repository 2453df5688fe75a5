"""Parameter values that vary by tensor: scalars, gradients over the layers, and lists chosen by name.

mergekit's reading (merging-maths, "Full-tensor reading of mergekit's grammar"): a gradient is interpolated linearly at
layer/(layers-1), a lone layer taking its last value, and everything outside the layers its first; of flags it takes the
one at or before that place; of ``{filter, value}`` entries the first whose filter is a part of the tensor's name wins,
no filter or ``*`` matching all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import MergeyardError
from app.recipe.methods import Parameter, Setting

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True)
class Position:
    """A tensor's place: its name, its layer (None outside the layers), and how many layers its stack or slice has."""

    name: str
    layer: int | None
    layers: int

    @property
    def t(self) -> float:
        """Depth from 0 to 1; 0 for everything outside the layers, 1 for a lone layer."""
        if self.layer is None:
            return 0.0
        return 1.0 if self.layers < 2 else self.layer / (self.layers - 1)


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor's name around its layer: ``stack`` (``model.layers``), the index, and the ``rest`` after it."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The same tensor's name in another layer."""
        return f"{self.stack}.{layer}.{self.rest}"


def layer_name(name: str) -> LayerName | None:
    """Where a tensor stands in its stack of layers, or None for embeddings, heads and final norms.

    The outermost index counts: T5's ``encoder.block.0.layer.1…`` is block 0, an expert's is its layer's.
    """
    match = LAYER.search(name)
    if match is None:
        return None
    return LayerName(name[: match.start(1) - 1], int(match.group(1)), name[match.end() :])


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
    if isinstance(raw, Mapping):
        raw = [raw]  # one filter entry, as mergekit takes it
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        if not raw:
            raise _invalid(where, f"{name} is an empty list; give a value, a gradient or filter entries")
        if any(isinstance(item, Mapping) for item in raw):
            return [_check_filter(item, parameter, f"{where}[{i}]", name) for i, item in enumerate(raw)]
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
        if isinstance(value[0], bool):
            return bool(value[int(position.t * (len(value) - 1))])
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
