"""The one signature of the kernel rooms: ``reference`` (plain torch, the oracle) and ``cpu`` (Numba).

All work is on blocks: whole rows of one tensor, flattened to n contiguous values, cut the same way whatever
the number of threads. A call is single-threaded; the engine runs many blocks side by side. Values per
parameter are always combined in the order of the sources, in float32, so every room gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

COARSE_BINS = 1 << 15  # magnitude bits 30..16 of a float32
FINE_BINS = 1 << 16  # bits 15..0
# Float64 sums: value i goes to lane i % LANES in flat order, then lanes add up in order, so all rooms round alike.
# This many stay in the first-level cache beside the values, and are enough not to wait for each other.
LANES = 128
SMALLEST_DIVISOR = 1e-8  # a sum of weights nearer to zero divides by 1 instead (mergekit's rule)

Elect = Literal["none", "mass", "count", "unanimous", "quorum"]
Divisor = Literal["none", "agreeing", "agreeing_weights", "sources", "weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """What survives in one block of one source: |δ| above ``threshold``, and the first ``equals`` at it.

    ``threshold`` is the float32 magnitude as its 31 bits (so denormals compare exactly); -1 keeps everything.
    ``equals`` counts in flat order within the block: the lowest flat index wins (merging-maths.md).
    ``rescale`` multiplies the survivors (1.0: as they are).
    """

    threshold: int = -1
    equals: int = 0
    rescale: float = 1.0


KEEP_ALL = Trim()
KEEP_NONE = Trim(threshold=0x7FFF_FFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How kept values of one parameter become one: result = ``base``·base + ``scale``·merged.

    ``elect``: ``none`` sums all; ``mass`` elects the sign of the sum; ``count`` the sign more sources hold;
    ``unanimous`` needs all ``sources`` non-zero with one sign, else 0; ``quorum`` as count, provided at least
    ``required`` sources hold it, else 0. A zero sum or an even count elects ``zero_sign``.
    ``weigh_votes``: weights multiply before the election, else after it.
    Only values of the elected sign are summed; with ``elect`` none, all that are not zero.
    ``divisor``: ``none``; ``agreeing`` (the number of values summed), ``agreeing_weights`` (the sum of their
    weights), ``sources`` (the number ``sources``), ``weights`` (the sum of all weights). One below
    ``SMALLEST_DIVISOR`` in magnitude counts as 1, so an empty sum is 0 whatever the divisor.
    """

    base: float = 1.0
    scale: float = 1.0
    elect: Elect = "none"
    weigh_votes: bool = True
    divisor: Divisor = "none"
    zero_sign: Literal[1, -1] = 1
    required: int = 0
    sources: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatistics:
    """Counts over one block. ``kept`` and ``squares`` (Σδ² before the trim, float64) are per source.

    ``active``: parameters with at least one kept non-zero value; ``conflicts``: those where kept values
    (times their weight) have both signs; ``merged_square``: Σ (result - base)² in float32 values summed in float64,
    before the cast; ``finite``: every result is finite, after the cast.

    A square that is not finite says that the source's δ holds NaN or infinity, and only that: float64 has
    room for the squares of float32. Look there too, for an election passes a NaN over and its result is finite.
    """

    kept: tuple[int, ...]
    squares: tuple[float, ...]
    active: int
    conflicts: int
    merged_square: float
    finite: bool


class Kernels(Protocol):
    """``delta``: float32 (n,), contiguous. ``deltas``: float32 (N, n), N ≥ 1, each row contiguous.

    Nothing is kept between calls.
    """

    name: str

    def histogram(self, delta: torch.Tensor, counts: torch.Tensor, prefix: int | None) -> None:
        """Add the block to ``counts`` (int64).

        (``COARSE_BINS``,) of all values where ``prefix`` is None, else (``FINE_BINS``,) of those whose coarse bin is
        ``prefix``.
        """
        ...

    def collect(self, delta: torch.Tensor, low: int, high: int, found: torch.Tensor) -> tuple[int, int]:
        """How many magnitudes, as their 31 bits, exceed ``high``, and how many lie from ``low`` to ``high``.

        ``found``, int32 (n,), takes the latter in flat order; beyond them it may hold anything.
        """
        ...

    def count_equal(self, delta: torch.Tensor, threshold: int) -> int:
        """How many magnitudes equal ``threshold`` exactly."""
        ...

    def kept_l1(self, delta: torch.Tensor, trim: Trim) -> float:
        """Σ|δ| of what ``trim`` keeps (``rescale`` not applied), summed in float64."""
        ...

    def elected_balance(self, deltas: torch.Tensor, trims: Sequence[Trim], weights: Sequence[float], rule: Rule) -> int:
        """Σ of the elected signs (+1, -1, and 0 where the vote is even): the paper's global majority, block by block.

        ``elect`` none votes as ``count``.
        """
        ...

    def merge(
        self,
        base: torch.Tensor,
        deltas: torch.Tensor,
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        """Trim, elect, merge, scale, add, cast into ``out``.

        ``base`` (n,) and ``out`` (n,): float32, float16 or bfloat16, rounded to nearest even.
        """
        ...
