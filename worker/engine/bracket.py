"""Where the k-th largest magnitude lies, by a sample; and exactly which it is, from what lies there.

The sample only saves time: the magnitudes above the bracket are counted and those inside are kept, so what is found is
exact, and where the k-th is not inside nothing is.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from app.planning.budgets import COLLECTED_BYTES
from worker.engine.ranking import ALL_EQUALS

Magnitudes: TypeAlias = npt.NDArray[np.int32]  # of float32, as their 31 bits
Bracket: TypeAlias = tuple[int, int]  # the least and the largest magnitude inside

SMALL = 1 << 16  # values that are all kept, where there are no more
_DEVIATIONS = 5.0  # on both sides of the quantile
_WIDEST = 0.2  # share of the values inside from which on histograms take less time
_ALL: Bracket = (0, 0x7FFF_FFFF)


@dataclass(frozen=True, slots=True)
class Sample:
    """float32 (groups, m) out of ``size`` values of one tensor."""

    values: torch.Tensor
    size: int


def bracket(samples: Sequence[Sample], k: int, size: int) -> Bracket | None:
    """Where the k-th largest of ``size`` values should lie. None where that holds too many.

    The groups of a sample are like each other: how the share above the threshold differs between them says how
    far the whole sample's may be from the truth.
    """
    if size <= SMALL:
        return _ALL
    groups = [_magnitudes(sample.values) for sample in samples]
    weights = np.concatenate(
        [np.full(own.shape[1], sample.size / own.size) for sample, own in zip(samples, groups, strict=True)]
    )
    columns = np.concatenate(groups, axis=1)
    if len(samples) == 1:
        ordered = np.sort(columns, axis=None)
        below = np.arange(1, len(ordered) + 1) * weights[0]
    else:
        order = np.argsort(columns, axis=None)
        ordered = columns.ravel()[order]
        below = np.cumsum(np.tile(weights, len(columns))[order])

    def place(rank: float) -> int:
        return int(np.searchsorted(below, rank))

    middle = ordered[min(place(size - k), len(ordered) - 1)]
    shares = ((columns > middle) * weights).sum(1) * len(columns) / size
    doubt = _DEVIATIONS * float(shares.std()) / math.sqrt(len(columns)) * size + 4 * float(weights.max())
    first, last = place(size - k - doubt), place(size - k + doubt)
    low = int(ordered[first]) if first > 0 else _ALL[0]
    high = int(ordered[last]) if last < len(ordered) else _ALL[1]
    inside = np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low, "left")
    return (low, high) if inside <= _WIDEST * len(ordered) else None


def _magnitudes(values: torch.Tensor) -> Magnitudes:
    return values.numpy().view(np.int32) & np.int32(0x7FFF_FFFF)


@dataclass(slots=True)
class Collected:
    """What one source of ``sources`` has above its bracket, and the magnitudes inside, block after block."""

    sources: int = 1
    above: int = 0
    inside: int = 0
    blocks: list[tuple[str, Magnitudes]] = field(default_factory=list)  # with the tensor's name

    def add(self, tensor: str, above: int, inside: Magnitudes) -> None:
        self.above += above
        self.inside += len(inside)
        if self.inside <= self._room:
            self.blocks.append((tensor, inside))
        else:
            self.blocks.clear()

    @property
    def _room(self) -> int:
        return COLLECTED_BYTES // 4 // self.sources

    def largest(self, k: int) -> tuple[int, int, int] | None:
        """The k-th largest, how many values equal to it are among the k, and how many there are; None: not inside."""
        left = k - self.above
        if not 1 <= left <= self.inside <= self._room:
            return None
        inside = np.concatenate([own for _, own in self.blocks])
        place = len(inside) - left
        threshold = int(np.partition(inside, place)[place])
        return threshold, left - int((inside > threshold).sum()), int((inside == threshold).sum())

    def shared(self, threshold: int, equals: int) -> dict[str, array[int]]:
        """How many of the values equal to the threshold each block keeps, by tensor: the first ``equals`` stay.

        A block that keeps all it has says ``ALL_EQUALS``, so that nobody looks for the last of them.
        """
        shared: dict[str, array[int]] = {}
        for tensor, own in self.blocks:
            present = int((own == threshold).sum())
            shared.setdefault(tensor, array("q")).append(ALL_EQUALS if 0 < present <= equals else min(equals, present))
            equals -= min(equals, present)
        return shared
