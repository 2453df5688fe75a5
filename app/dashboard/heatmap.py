"""What a merge did, layer by layer and module by module: the statistics of its tensors, put together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from app.recipe.values import layer_name

EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
PARAMETER = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Some tensors together: how many, and of how many parameters.

    ``sign_conflict``: the share of changed parameters whose sources disagree in sign; ``trimmed``: of the sources'
    values, the share that was set to zero. Both are means over the tensors by their size, None where no tensor has
    one. ``norm``: ‖result - base‖₂ of all of them as one vector.
    """

    tensors: int
    parameters: int
    sign_conflict: float | None
    trimmed: float | None
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """``cells`` by (stack of layers, layer, module) and ``outside`` the layers by name; ``whole`` is all together.

    ``stacks``: of each stack the layers' numbers and the modules, in the order of the checkpoint.
    """

    stacks: Mapping[str, tuple[range, tuple[str, ...]]]
    cells: Mapping[tuple[str, int, str], Cell]
    outside: Mapping[str, Cell]
    whole: Cell

    @property
    def most(self) -> Mapping[str, tuple[str, int, str]]:
        """Where each figure is greatest: by its name the cell's place, for figures that any cell has."""
        found = {}
        for figure in ("sign_conflict", "trimmed", "norm"):
            known = {place: value for place, cell in self.cells.items() if (value := getattr(cell, figure)) is not None}
            if known:
                found[figure] = max(known, key=known.__getitem__)
        return found


def heatmap(statistics: Mapping[str, Mapping[str, Any]]) -> Heatmap | None:
    """``statistics`` as in the manifest, by tensor; None where the merge changed none.

    The experts of a layer are one module (``mlp.experts.*.up_proj``), and so are a weight and its bias.
    """
    if not statistics:
        return None
    places: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    outside: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in statistics.items():
        place = layer_name(name)
        if place is None:
            outside.setdefault(PARAMETER.sub("", name), []).append(entry)
        else:
            module = EXPERT.sub("*", PARAMETER.sub("", place.rest))
            places.setdefault((place.stack, place.layer, module), []).append(entry)
    stacks = {
        stack: (
            range(max(layer for name, layer, _ in places if name == stack) + 1),
            tuple(dict.fromkeys(module for name, _, module in places if name == stack)),
        )
        for stack in dict.fromkeys(stack for stack, _, _ in places)
    }
    return Heatmap(
        stacks=stacks,
        cells={place: _cell(entries) for place, entries in places.items()},
        outside={name: _cell(entries) for name, entries in outside.items()},
        whole=_cell(statistics.values()),
    )


def _cell(entries: Iterable[Mapping[str, Any]]) -> Cell:
    found = list(entries)
    conflicts = [(entry["sign_conflict"], entry["parameters"]) for entry in found]
    trims = [
        (sum(entry["trimmed"]) / len(entry["trimmed"]) if entry["trimmed"] else None, entry["parameters"])
        for entry in found
    ]
    return Cell(
        tensors=len(found),
        parameters=sum(entry["parameters"] for entry in found),
        sign_conflict=_mean(conflicts),
        trimmed=_mean(trims),
        norm=math.sqrt(math.fsum(entry["merged_norm"] ** 2 for entry in found)),
    )


def _mean(shares: Iterable[tuple[float | None, int]]) -> float | None:
    """By size, of those that are known."""
    known = [(share, size) for share, size in shares if share is not None]
    whole = sum(size for _, size in known)
    return math.fsum(share * size for share, size in known) / whole if whole else None
