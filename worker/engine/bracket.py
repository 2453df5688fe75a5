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
_EVERY = 64  # of the magnitudes near a threshold, to look closer
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
    # where the k-th lies matters little to how the groups differ there: of large samples some columns tell it
    thin = slice(None, None, max(1, columns.size >> 13) if len(samples) == 1 else 1)
    own_weights = weights[thin] * (weights.sum() / weights[thin].sum())
    (middle,) = _at(columns[:, thin], own_weights, [size - k])
    above = columns > (_ALL[1] if middle is None else middle)
    shares = (np.count_nonzero(above, axis=1) * weights[0] if len(samples) == 1 else above @ weights) / size
    doubt = _DEVIATIONS * float(shares.std()) * math.sqrt(len(columns)) * size + 4 * float(weights.max())
    low, high = _at(columns, weights, [size - k - doubt, size - k + doubt])
    found = (_ALL[0] if low is None else low, _ALL[1] if high is None else high)
    inside = int(np.count_nonzero((columns >= found[0]) & (columns <= found[1])))
    return found if inside <= _WIDEST * columns.size else None


def _at(columns: Magnitudes, weights: npt.NDArray[np.float64], ranks: Sequence[float]) -> list[int | None]:
    """At which magnitudes so much weight lies at or below; None at the sample's least, and beyond its largest.

    Equal weights need no sorting, which would take three times as long.
    """
    if weights.min() == weights.max():
        places = [max(0, math.ceil(rank / weights[0]) - 1) for rank in ranks]
        within = [place for place in places if 0 < place < columns.size]
        ordered = np.partition(columns, within, axis=None) if within else columns.ravel()
    else:
        order = np.argsort(columns, axis=None)
        below = np.cumsum(np.tile(weights, len(columns))[order])
        places = [int(place) for place in np.searchsorted(below, ranks)]
        ordered = columns.ravel()[order]
    return [int(ordered[place]) if 0 < place < len(ordered) else None for place in places]


def kth_largest(values: Magnitudes, k: int) -> int:
    """Exactly, with most values looked at no more than twice: a partition of all takes six times as long.

    Two order statistics of every 64th value lie on both sides of it in all likelihood (Floyd and Rivest).
    """
    place = len(values) - k
    if len(values) > SMALL:
        some = values[::_EVERY]
        middle, doubt = place / _EVERY, _DEVIATIONS * math.sqrt(len(some)) / 2 + 1
        first, last = max(0, int(middle - doubt)), min(len(some) - 1, int(middle + doubt) + 1)
        ordered = np.partition(some, [first, last])
        low, high = ordered[first], ordered[last]
        above = int(np.count_nonzero(values > high))
        near = values[(values >= low) & (values <= high)]
        if above < k <= above + len(near):
            values, place = near, len(near) - (k - above)
    return int(np.partition(values, place)[place])


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
        threshold = kth_largest(inside, left)
        above, equal = (int(np.count_nonzero(which)) for which in (inside > threshold, inside == threshold))
        return threshold, left - above, equal

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
