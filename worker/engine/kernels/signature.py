"""The one signature of the kernel rooms: ``reference`` (plain torch, the oracle), ``cpu`` (Numba), ``cuda`` (Triton).

All work is on blocks: whole rows of one tensor, flattened to n contiguous values, cut the same way whatever
the number of threads. The engine runs many blocks side by side, each call on one thread. Values per parameter are
always combined in the order of the sources, in float32, one rounding an operation (nothing is contracted to a fused
multiply-add), so every room gives the same numbers bit for bit. Float *statistics* (``squares``, ``merged_square``,
``kept_l1``) are the same from call to call of one room; between rooms they agree to a relative 1e-6 only, so that each
may sum in the order that suits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

COARSE_BINS = 1 << 15  # magnitude bits 30..16 of a float32
FINE_BINS = 1 << 16  # bits 15..0
SMALLEST_DIVISOR = 1e-8  # a sum of weights nearer to zero divides by 1 instead (mergekit's rule)
# The least float32 magnitude that is infinite after the cast.
OVERFLOW = {torch.float32: float("inf"), torch.float16: 65520.0, torch.bfloat16: (2 - 2**-8) * 2.0**127}

Elect = Literal["none", "mass", "count", "unanimous", "quorum"]
Divisor = Literal["none", "agreeing", "agreeing_weights", "sources", "weights"]


@dataclass(frozen=True, slots=True)
class Product:
    """δ = scale · (left · right) over whole rows (or one part of a row) of one matrix, flattened row by row.

    ``left`` float32 (rows, r), ``right`` float32 (r, columns), r ≥ 1; rows · columns = n. The last axis of each is
    contiguous, the first may have any step. The r products of a value are added in the order of the rank, from the
    first on: acc = l₀·r₀; acc = acc + l₁·r₁; …; δ = scale · acc. Both lie where ``Kernels.place`` put them.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Difference:
    """δ = scale · (own - base), both (n,) as they are stored (float32, float16 or bfloat16), widened first."""

    own: torch.Tensor
    base: torch.Tensor
    scale: float = 1.0


Delta: TypeAlias = torch.Tensor | Product | Difference  # the tensor: δ as it is, float32 (n,), contiguous


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
    """Counts over one block. ``kept`` and ``squares`` (Σδ² before the trim) are per source.

    ``active``: parameters with at least one kept non-zero value; ``conflicts``: those where kept values
    (times their weight) have both signs; ``merged_square``: Σ (result - base)² of float32 values, before the cast;
    ``finite``: every result is finite, after the cast.

    A square that is not finite says that the source's δ holds NaN or infinity, and only that: the squares of finite
    values that float32 has no room for are summed in float64. Look there too, for an election passes a NaN over and
    its result is finite.
    """

    kept: tuple[int, ...]
    squares: tuple[float, ...]
    active: int
    conflicts: int
    merged_square: float
    finite: bool


class Kernels(Protocol):
    """What one block's work needs, δ formed on the way and never written to memory unless it came from there.

    Every tensor but a Product's factors may lie in the host's memory or where the kernels work. ``deltas`` has at
    least one. Nothing is kept between calls that another block could see.
    """

    name: str

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """The values (factors of many blocks) where the kernels work: on the CPU, the same tensor."""
        ...

    def memory(self, size: int) -> torch.Tensor:
        """uint8 (size,) of the host, uninitialised, from and to which the kernels move data fastest."""
        ...

    def form(self, delta: Delta, out: torch.Tensor) -> None:
        """Write δ into ``out``, float32 (n,), contiguous."""
        ...

    def histogram(self, delta: Delta, counts: torch.Tensor, prefix: int | None) -> None:
        """Add the block to ``counts`` (int64).

        (``COARSE_BINS``,) of all values where ``prefix`` is None, else (``FINE_BINS``,) of those whose coarse bin is
        ``prefix``.
        """
        ...

    def collect(
        self, deltas: Sequence[Delta], brackets: Sequence[tuple[int, int]], found: torch.Tensor
    ) -> list[tuple[int, int]]:
        """Of each δ: how many magnitudes, as their 31 bits, exceed its bracket's high, and how many lie in the bracket.

        ``brackets``: low and high, both inside. ``found``, int32 (N, m): row s takes those inside, in any order; where
        there are more than m it holds m of them.
        """
        ...

    def count_equal(self, delta: Delta, threshold: int) -> int:
        """How many magnitudes equal ``threshold`` exactly."""
        ...

    def kept_l1(self, delta: Delta, trim: Trim) -> float:
        """Σ|δ| of what ``trim`` keeps (``rescale`` not applied), summed in float64."""
        ...

    def elected_balance(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], rule: Rule
    ) -> int:
        """Σ of the elected signs (+1, -1, and 0 where the vote is even): the paper's global majority, block by block.

        ``elect`` none votes as ``count``.
        """
        ...

    def merge(
        self,
        base: torch.Tensor,
        deltas: Sequence[Delta],
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        """Trim, elect, merge, scale, add, cast into ``out``.

        ``base`` (n,) and ``out`` (n,): float32, float16 or bfloat16, rounded to nearest even. A Difference whose base
        is the same memory as ``base`` reads it once.
        """
        ...
