"""The ``cpu`` room: packs what the compiled loops of ``cpu_loops`` take, and unpacks what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from worker.engine.kernels import cpu_loops as loops
from worker.engine.kernels.cpu_loops import Floats, Halves, Longs, Words
from worker.engine.kernels.signature import (
    KEEP_NONE,
    OVERFLOW,
    SMALLEST_DIVISOR,
    BlockStatistics,
    Delta,
    Difference,
    Elect,
    Product,
    Rule,
    Trim,
)

Result = TypeVar("Result")

ELECTIONS: dict[Elect, int] = {
    "none": loops.NONE,
    "mass": loops.MASS,
    "count": loops.COUNT,
    "unanimous": loops.UNANIMOUS,
    "quorum": loops.QUORUM,
}


class CpuKernels:
    """The ``cpu`` room; see ``signature.Kernels`` for shapes and meanings."""

    name = "cpu"

    def place(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def form(self, delta: Delta, out: torch.Tensor) -> None:
        _packed([delta]).run(loops.form, out.numpy())

    def histogram(self, delta: Delta, counts: torch.Tensor, prefix: int | None) -> None:
        packed = _packed([delta])
        if prefix is None:
            packed.run(loops.coarse_histogram, counts.numpy())
        else:
            packed.run(loops.fine_histogram, prefix, counts.numpy())

    def collect(
        self, deltas: Sequence[Delta], brackets: Sequence[tuple[int, int]], found: torch.Tensor
    ) -> list[tuple[int, int]]:
        counts = np.empty((len(deltas), 2), dtype=np.int64)
        _packed(deltas).run(loops.collect, np.array(brackets, dtype=np.int32), found.numpy(), counts)
        return [(above, inside) for above, inside in counts.tolist()]

    def count_equal(self, delta: Delta, threshold: int) -> int:
        return _packed([delta]).run(loops.count_equal, threshold)

    def kept_l1(self, delta: Delta, trim: Trim) -> float:
        packed = _packed([delta])
        return packed.run(loops.kept_l1, trim.threshold, _cut(delta, packed.size, trim))

    def elected_balance(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], rule: Rule
    ) -> int:
        packed = _packed(deltas)
        before, _ = _factors(weights, rule)
        return packed.run(
            loops.elected_balance,
            *_trim_arrays(deltas, packed.size, trims),
            before,
            loops.COUNT if rule.elect == "none" else ELECTIONS[rule.elect],
            rule.sources,
            rule.required,
        )

    def merge(
        self,
        base: torch.Tensor,
        deltas: Sequence[Delta],
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        packed = _packed(deltas)
        before, after = _factors(weights, rule)
        divisor, shares = _divisor(weights, rule)
        result = torch.empty(out.shape, dtype=torch.float32) if out.dtype == torch.float16 else out
        kept = np.empty(len(weights), dtype=np.int64)
        squares = np.empty(len(weights), dtype=np.float64)
        active, conflicts, merged_square, finite = packed.run(
            loops.merge,
            *_arrays(base.float() if base.dtype == torch.float16 else base),
            *_trim_arrays(deltas, packed.size, trims),
            before,
            after,
            ELECTIONS[rule.elect],
            rule.sources,
            rule.required,
            np.float32(rule.zero_sign),
            divisor,
            shares,
            np.float32(rule.base),
            np.float32(rule.scale),
            np.float32(SMALLEST_DIVISOR),
            np.float32(OVERFLOW[out.dtype]),
            _is_plain(trims, after, rule),
            *_arrays(result),
            kept,
            squares,
        )
        if result is not out:
            out.copy_(result)
        return BlockStatistics(
            kept=tuple(kept.tolist()),
            squares=tuple(squares.tolist()),
            active=int(active),
            conflicts=int(conflicts),
            merged_square=float(merged_square),
            finite=bool(finite),
        )


@dataclass(frozen=True, slots=True)
class _Packed:
    """δ of some sources as the loops take them, by addresses. ``held``: what lies there."""

    operands: Longs
    scales: Floats
    rows: int
    columns: int
    held: Sequence[object]

    def run(self, loop: Callable[..., Result], *arguments: object) -> Result:
        """Call a loop; what the addresses lead to is held meanwhile."""
        return loop(self.operands, self.scales, self.rows, self.columns, *arguments)

    @property
    def size(self) -> int:
        return self.rows * self.columns


def _packed(deltas: Sequence[Delta]) -> _Packed:
    """A product whose rows are not those of the first one is formed: a block has one shape for all."""
    shape = next(((len(delta.left), delta.right.shape[1]) for delta in deltas if isinstance(delta, Product)), None)
    fields: list[tuple[int, ...]] = []
    scales: list[float] = []
    held: list[object] = []
    for delta in deltas:
        match delta:
            case Product(left, right, scale) if (len(left), right.shape[1]) == shape:
                steps = left.stride(0), right.stride(0)
                fields.append((loops.PRODUCT, left.data_ptr(), right.data_ptr(), *steps, len(right)))
                scales.append(scale)
                held.append(delta)
            case Difference(own, base, scale):
                sides = [side.float() if side.dtype == torch.float16 else side for side in (own, base)]
                halves = [int(side.dtype == torch.bfloat16) for side in sides]
                fields.append((loops.DIFFERENCE, sides[0].data_ptr(), sides[1].data_ptr(), *halves, 0))
                scales.append(scale)
                held.append(sides)
            case _:
                values = _formed(delta)
                fields.append((loops.DENSE, values.data_ptr(), 0, 0, 0, 0))
                scales.append(1.0)
                held.append(values)
    rows, columns = shape or (1, _size(deltas[0]))
    return _Packed(np.array(fields, dtype=np.int64), np.array(scales, dtype=np.float32), rows, columns, held)


def _formed(delta: Delta) -> torch.Tensor:
    """δ as it is, float32 (n,)."""
    if isinstance(delta, torch.Tensor):
        return delta
    values = torch.empty(_size(delta))
    _packed([delta]).run(loops.form, values.numpy())
    return values


def _size(delta: Delta) -> int:
    match delta:
        case Product(left, right):
            return len(left) * right.shape[1]
        case Difference(own):
            return len(own)
        case values:
            return len(values)


def _trim_arrays(deltas: Sequence[Delta], size: int, trims: Sequence[Trim]) -> tuple[Words, Longs, Floats]:
    """Thresholds, cuts (see ``_cut``) and factors of the survivors, for each source and up to a multiple of four."""
    count = len(trims) + -len(trims) % 4
    thresholds = np.full(count, KEEP_NONE.threshold, dtype=np.int32)
    cuts = np.zeros(count, dtype=np.int64)
    for s, (delta, trim) in enumerate(zip(deltas, trims, strict=True)):
        thresholds[s] = trim.threshold
        cuts[s] = _cut(delta, size, trim)
    return thresholds, cuts, _padded([trim.rescale for trim in trims])


def _cut(delta: Delta, size: int, trim: Trim) -> int:
    """The flat index after the last kept value equal to the threshold: before it equals are kept, from it none."""
    if trim.equals <= 0 or trim.threshold < 0:
        return 0
    if trim.equals >= size:
        return size
    return int(loops.cut(_formed(delta).numpy(), trim.threshold, trim.equals))


def _padded(values: Sequence[float]) -> Floats:
    """float32, with zeros for the sources that the last four lack."""
    padded = np.zeros(len(values) + -len(values) % 4, dtype=np.float32)
    padded[: len(values)] = values
    return padded


def _factors(weights: Sequence[float], rule: Rule) -> tuple[Floats, Floats]:
    """What multiplies each source's values before the election, and after it."""
    own = _padded(weights)
    ones = np.ones_like(own)
    return (own, ones) if rule.weigh_votes else (ones, own)


def _is_plain(trims: Sequence[Trim], after: Floats, rule: Rule) -> bool:
    """See ``loops.merge``."""
    if rule.elect != "mass" or rule.zero_sign < 0 or len(trims) > 4:
        return False
    return bool((after[: len(trims)] == 1).all()) and all(trim.rescale == 1 for trim in trims)


def _divisor(weights: Sequence[float], rule: Rule) -> tuple[np.float32, Floats]:
    """The divisor before any source agrees, and what each adds where it does."""
    own = _padded(weights)
    nothing = np.zeros_like(own)
    if rule.divisor == "agreeing":
        return loops.ZERO, nothing + loops.ONE
    if rule.divisor == "agreeing_weights":
        return loops.ZERO, own
    if rule.divisor == "weights":
        return np.float32(sum(weights)), nothing
    return np.float32(rule.sources if rule.divisor == "sources" else 1), nothing


def _arrays(values: torch.Tensor) -> tuple[Floats, Halves]:
    """The tensor as float32 and as bfloat16 bits; the one that it is not is empty, so that one loop serves both."""
    if values.dtype == torch.bfloat16:
        return np.empty(0, dtype=np.float32), values.view(torch.uint16).numpy()
    return values.numpy(), np.empty(0, dtype=np.uint16)
