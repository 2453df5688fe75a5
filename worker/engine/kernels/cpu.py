"""The ``cpu`` room: Numba loops over tiles that stay in the first-level cache, one thread a call, without the GIL.

Every loop is elementwise over one tile, so LLVM vectorises it without reordering a sum: fastmath stays off and the
numbers equal the reference's bit for bit. Floats are reinterpreted as integers through array views, and bfloat16,
which NumPy does not know, goes through uint16. Float16 is converted by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch

from worker.engine.kernels.signature import LANES, SMALLEST_DIVISOR, BlockStatistics, Elect, Rule, Trim

P = ParamSpec("P")
R = TypeVar("R")
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.uint16]  # bfloat16 bits
Words = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

# A tile is one step of the lanes of every float64 sum.
TILE = LANES
MAGNITUDE = np.int32(0x7FFF_FFFF)
ZERO = np.float32(0)
ONE = np.float32(1)
SMALLEST = np.float32(SMALLEST_DIVISOR)

NONE, MASS, COUNT, UNANIMOUS, QUORUM = range(5)
ELECTIONS: dict[Elect, int] = {
    "none": NONE,
    "mass": MASS,
    "count": COUNT,
    "unanimous": UNANIMOUS,
    "quorum": QUORUM,
}
# The least float32 magnitude that is infinite after the cast.
OVERFLOW = {torch.float32: float("inf"), torch.float16: 65520.0, torch.bfloat16: (2 - 2**-8) * 2.0**127}
POSITIVE, NEGATIVE, ACTIVE = 1, 2, 4


class CpuKernels:
    """The ``cpu`` room; see ``signature.Kernels`` for shapes and meanings."""

    name = "cpu"

    def histogram(self, delta: torch.Tensor, counts: torch.Tensor, prefix: int | None) -> None:
        if prefix is None:
            _coarse_histogram(delta.numpy(), counts.numpy())
        else:
            _fine_histogram(delta.numpy(), counts.numpy(), prefix)

    def count_equal(self, delta: torch.Tensor, threshold: int) -> int:
        return int(_count_equal(delta.numpy(), threshold))

    def kept_l1(self, delta: torch.Tensor, trim: Trim) -> float:
        values = delta.numpy()
        return float(_kept_l1(values, trim.threshold, _cut(values, trim.threshold, trim.equals)))

    def elected_balance(self, deltas: torch.Tensor, trims: Sequence[Trim], weights: Sequence[float], rule: Rule) -> int:
        rows, stride = _rows(deltas)
        before, _ = _factors(weights, rule)
        return int(
            _elected_balance(
                rows,
                stride,
                deltas.shape[1],
                *_trim_arrays(deltas, trims),
                before,
                ELECTIONS[rule.elect],
                rule.sources,
                rule.required,
            )
        )

    def merge(
        self,
        base: torch.Tensor,
        deltas: torch.Tensor,
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        rows, stride = _rows(deltas)
        before, after = _factors(weights, rule)
        divisor, shares = _divisor(weights, rule)
        base_floats, base_halves = _arrays(base.float() if base.dtype == torch.float16 else base)
        result = torch.empty(out.shape, dtype=torch.float32) if out.dtype == torch.float16 else out
        result_floats, result_halves = _arrays(result)
        kept = np.zeros(len(weights), dtype=np.int64)
        squares = np.zeros(len(weights), dtype=np.float64)
        active, conflicts, merged_square, finite = _merge(
            base_floats,
            base_halves,
            rows,
            stride,
            deltas.shape[1],
            *_trim_arrays(deltas, trims),
            np.asarray(weights, dtype=np.float32),
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
            np.float32(OVERFLOW[out.dtype]),
            result_floats,
            result_halves,
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


def _rows(deltas: torch.Tensor) -> tuple[Floats, int]:
    """All rows as one flat array and the step between them: one array type to compile for, whatever the step."""
    count, n = deltas.shape
    step = deltas.stride(0) if count > 1 else n
    return deltas.as_strided(((count - 1) * step + n,), (1,)).numpy(), step


def _trim_arrays(deltas: torch.Tensor, trims: Sequence[Trim]) -> tuple[Words, Longs, Floats]:
    """Thresholds, cuts (see ``_cut``) and factors of the survivors, one for each source."""
    cuts = [_cut(delta.numpy(), trim.threshold, trim.equals) for delta, trim in zip(deltas, trims, strict=True)]
    return (
        np.array([trim.threshold for trim in trims], dtype=np.int32),
        np.array(cuts, dtype=np.int64),
        np.array([trim.rescale for trim in trims], dtype=np.float32),
    )


def _factors(weights: Sequence[float], rule: Rule) -> tuple[Floats, Floats]:
    """What multiplies each source's values before the election, and after it."""
    own = np.asarray(weights, dtype=np.float32)
    ones = np.ones_like(own)
    return (own, ones) if rule.weigh_votes else (ones, own)


def _divisor(weights: Sequence[float], rule: Rule) -> tuple[np.float32, Floats]:
    """The divisor before any source agrees, and what each adds where it does."""
    nothing = np.zeros(len(weights), dtype=np.float32)
    if rule.divisor == "agreeing":
        return ZERO, nothing + ONE
    if rule.divisor == "agreeing_weights":
        return ZERO, np.asarray(weights, dtype=np.float32)
    if rule.divisor == "weights":
        return np.float32(sum(weights)), nothing
    return np.float32(rule.sources if rule.divisor == "sources" else 1), nothing


def _arrays(values: torch.Tensor) -> tuple[Floats, Halves]:
    """The tensor as float32 and as bfloat16 bits; the one that it is not is empty, so that one loop serves both."""
    if values.dtype == torch.bfloat16:
        return np.empty(0, dtype=np.float32), values.view(torch.uint16).numpy()
    return values.numpy(), np.empty(0, dtype=np.uint16)


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Numba, compiled at the first call and cached on disk where any folder can be written.

    ``error_model="numpy"`` leaves out the test for a zero divisor, which would keep the loop from vectorising.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[P, R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder is writable
        compiled = numba.njit(**options)(function)
    return compiled


@_compiled
def _coarse_histogram(delta: Floats, counts: Longs) -> None:
    """Four interleaved histograms: two equal values in a row do not wait for each other (13 ms against 19 ms for
    16 M normal values, 16 against 26 where half are zero)."""
    bits = delta.view(np.int32)
    lanes = np.zeros((4, len(counts)), dtype=np.uint32)
    whole = len(bits) // 4 * 4
    for i in range(0, whole, 4):
        lanes[0, (bits[i] & MAGNITUDE) >> 16] += np.uint32(1)
        lanes[1, (bits[i + 1] & MAGNITUDE) >> 16] += np.uint32(1)
        lanes[2, (bits[i + 2] & MAGNITUDE) >> 16] += np.uint32(1)
        lanes[3, (bits[i + 3] & MAGNITUDE) >> 16] += np.uint32(1)
    for i in range(whole, len(bits)):
        lanes[0, (bits[i] & MAGNITUDE) >> 16] += np.uint32(1)
    for lane in range(4):
        for j in range(len(counts)):
            counts[j] += lanes[lane, j]


@_compiled
def _fine_histogram(delta: Floats, counts: Longs, prefix: int) -> None:
    """Few values lie in the coarse bin: flag them eight to a word and look only into words that are not zero
    (9 ms against 19 ms for 16 M values)."""
    bits = delta.view(np.int32)
    wanted = np.int32(prefix)
    flags = np.zeros(TILE, dtype=np.uint8)
    words = flags.view(np.uint64)
    for start in range(0, len(bits), TILE):
        tile = bits[start : start + TILE]
        for j in range(len(tile)):
            flags[j] = ((tile[j] & MAGNITUDE) >> 16) == wanted
        for w in range(len(words)):
            if words[w] != 0:
                for j in range(8 * w, min(8 * w + 8, len(tile))):
                    counts[tile[j] & 0xFFFF] += flags[j]


@_compiled
def _count_equal(delta: Floats, threshold: int) -> int:
    bits = delta.view(np.int32)
    wanted = np.int32(threshold)
    count = 0
    for i in range(len(bits)):
        count += (bits[i] & MAGNITUDE) == wanted
    return count


@_compiled
def _cut(delta: Floats, threshold: int, equals: int) -> int:
    """The flat index after the last kept value equal to the threshold: before it equals are kept, from it none."""
    if equals <= 0 or threshold < 0:
        return 0
    bits = delta.view(np.int32)
    wanted = np.int32(threshold)
    left = equals
    for start in range(0, len(bits), TILE):
        tile = bits[start : start + TILE]
        here = 0
        for j in range(len(tile)):
            here += (tile[j] & MAGNITUDE) == wanted
        if here >= left:
            for j in range(len(tile)):
                left -= (tile[j] & MAGNITUDE) == wanted
                if left == 0:
                    return start + j + 1
        left -= here
    return len(bits)


@_compiled
def _lanes_sum(lanes: Doubles) -> float:
    total = 0.0
    for lane in lanes:
        total += lane
    return total


@_compiled
def _kept_l1(delta: Floats, threshold: int, cut: int) -> float:
    kept = np.empty(TILE, dtype=np.float32)
    lanes = np.zeros(TILE, dtype=np.float64)
    for start in range(0, len(delta), TILE):
        tile = delta[start : start + TILE]
        _keep(tile, np.int32(threshold), cut - start, ONE, kept)
        for j in range(len(tile)):
            lanes[j] += np.float64(abs(kept[j]))
    return _lanes_sum(lanes)


@_compiled
def _keep(tile: Floats, threshold: np.int32, cut: int, rescale: np.float32, kept: Floats) -> int:
    """Trim one tile into ``kept``; returns how many values survive. ``cut`` counts from the start of the tile."""
    middle = min(max(cut, 0), len(tile))
    return _keep_above(tile[:middle], np.int32(threshold - 1), rescale, kept) + _keep_above(
        tile[middle:], threshold, rescale, kept[middle:]
    )


@_compiled
def _keep_above(tile: Floats, threshold: np.int32, rescale: np.float32, kept: Floats) -> int:
    bits = tile.view(np.int32)
    count = 0
    for j in range(len(tile)):
        survives = (bits[j] & MAGNITUDE) > threshold
        kept[j] = tile[j] * rescale if survives else ZERO
        count += survives
    return count


@_compiled
def _add_vote(kept: Floats, factor: np.float32, election: int, width: int, mass: Floats, tally: Words) -> None:
    """One source's vote: its value into ``mass``, or its sign into ``tally`` (+ in the low 16 bits, - above)."""
    if election == MASS:
        for j in range(width):
            mass[j] += factor * kept[j]
    else:
        for j in range(width):
            vote = factor * kept[j]
            tally[j] += np.int32(vote > ZERO) + (np.int32(vote < ZERO) << 16)


@_compiled
def _elect(
    election: int,
    sources: int,
    required: int,
    even: np.float32,
    width: int,
    mass: Floats,
    tally: Words,
    elected: Floats,
) -> None:
    """The elected sign of each parameter of a tile: +1, -1, or 0; ``even`` where neither outweighs the other."""
    if election == MASS:
        for j in range(width):
            elected[j] = ONE if mass[j] > ZERO else (-ONE if mass[j] < ZERO else even)
        return
    least = 0
    most = 1 << 16
    if election == UNANIMOUS:
        least = most = sources
    elif election == QUORUM:
        least = required
    for j in range(width):
        positive = tally[j] & 0xFFFF
        negative = tally[j] >> 16
        sign = ONE if positive > negative else (-ONE if positive < negative else even)
        holding = positive if sign > ZERO else negative
        elected[j] = sign if least <= holding <= most else ZERO


@_compiled
def _elected_balance(
    rows: Floats,
    stride: int,
    n: int,
    thresholds: Words,
    cuts: Longs,
    rescales: Floats,
    before: Floats,
    election: int,
    sources: int,
    required: int,
) -> int:
    kept = np.empty(TILE, dtype=np.float32)
    mass = np.empty(TILE, dtype=np.float32)
    tally = np.empty(TILE, dtype=np.int32)
    elected = np.zeros(TILE, dtype=np.float32)
    balance = 0
    for start in range(0, n, TILE):
        width = min(TILE, n - start)
        mass[:] = ZERO
        tally[:] = 0
        for s in range(len(thresholds)):
            tile = rows[s * stride + start : s * stride + start + width]
            _keep(tile, thresholds[s], cuts[s] - start, rescales[s], kept)
            _add_vote(kept, before[s], election, width, mass, tally)
        _elect(election, sources, required, ZERO, width, mass, tally, elected)
        for j in range(width):
            balance += int(elected[j])
    return balance


@_compiled
def _merge(
    base: Floats,
    base_halves: Halves,
    rows: Floats,
    stride: int,
    n: int,
    thresholds: Words,
    cuts: Longs,
    rescales: Floats,
    weights: Floats,
    before: Floats,
    after: Floats,
    election: int,
    sources: int,
    required: int,
    zero_sign: np.float32,
    divisor: np.float32,
    shares: Floats,
    base_factor: np.float32,
    scale: np.float32,
    overflow: np.float32,
    out: Floats,
    out_halves: Halves,
    kept_counts: Longs,
    squares: Doubles,
) -> tuple[int, int, float, bool]:
    """Tile by tile: trim and vote source by source, elect, sum source by source, divide, add the base, cast."""
    count = len(thresholds)
    kept = np.empty((count, TILE), dtype=np.float32)
    mass = np.empty(TILE, dtype=np.float32)
    tally = np.empty(TILE, dtype=np.int32)
    marks = np.empty(TILE, dtype=np.int32)
    elected = np.empty(TILE, dtype=np.float32)
    total = np.empty(TILE, dtype=np.float32)
    divisors = np.empty(TILE, dtype=np.float32)
    origin = np.empty(TILE, dtype=np.float32)
    result = np.empty(TILE, dtype=np.float32)
    square_lanes = np.zeros((count, TILE), dtype=np.float64)
    merged_lanes = np.zeros(TILE, dtype=np.float64)
    active = 0
    conflicts = 0
    overflows = 0

    for start in range(0, n, TILE):
        width = min(TILE, n - start)
        mass[:] = ZERO
        tally[:] = 0
        marks[:] = 0
        for s in range(count):
            tile = rows[s * stride + start : s * stride + start + width]
            kept_counts[s] += _keep(tile, thresholds[s], cuts[s] - start, rescales[s], kept[s])
            _add_squares(tile, square_lanes[s])
            if election != NONE:
                _add_vote(kept[s], before[s], election, width, mass, tally)
            _mark(kept[s], weights[s], width, marks)
        for j in range(width):
            active += marks[j] >= ACTIVE
            conflicts += (marks[j] & (POSITIVE | NEGATIVE)) == (POSITIVE | NEGATIVE)

        total[:] = ZERO
        divisors[:] = divisor
        if election != NONE:
            _elect(election, sources, required, zero_sign, width, mass, tally, elected)
        for s in range(count):
            if election == NONE:
                _sum_all(kept[s], before[s], after[s], shares[s], width, total, divisors)
            else:
                _sum_agreeing(kept[s], before[s], after[s], shares[s], width, elected, total, divisors)

        _load(base, base_halves, start, width, origin)
        overflows += _finish(total, divisors, origin, base_factor, scale, overflow, width, result)
        for j in range(width):
            change = np.float64(result[j] - origin[j])
            merged_lanes[j] += change * change
        _store(result, start, width, out, out_halves)

    for s in range(count):
        squares[s] = _lanes_sum(square_lanes[s])
    return active, conflicts, _lanes_sum(merged_lanes), overflows == 0


@_compiled
def _add_squares(tile: Floats, lanes: Doubles) -> None:
    for j in range(len(tile)):
        value = np.float64(tile[j])
        lanes[j] += value * value


@_compiled
def _mark(kept: Floats, weight: np.float32, width: int, marks: Words) -> None:
    for j in range(width):
        weighted = weight * kept[j]
        marks[j] |= (
            np.int32(weighted > ZERO) * POSITIVE
            + np.int32(weighted < ZERO) * NEGATIVE
            + np.int32(kept[j] != ZERO) * ACTIVE
        )


@_compiled
def _sum_all(
    kept: Floats,
    before: np.float32,
    after: np.float32,
    share: np.float32,
    width: int,
    total: Floats,
    divisors: Floats,
) -> None:
    for j in range(width):
        value = before * kept[j]
        total[j] += after * value
        divisors[j] += share if value != ZERO else ZERO


@_compiled
def _sum_agreeing(
    kept: Floats,
    before: np.float32,
    after: np.float32,
    share: np.float32,
    width: int,
    elected: Floats,
    total: Floats,
    divisors: Floats,
) -> None:
    for j in range(width):
        value = before * kept[j]
        agrees = value * elected[j] > ZERO
        total[j] += after * value if agrees else ZERO
        divisors[j] += share if agrees else ZERO


@_compiled
def _finish(
    total: Floats,
    divisors: Floats,
    origin: Floats,
    base_factor: np.float32,
    scale: np.float32,
    overflow: np.float32,
    width: int,
    result: Floats,
) -> int:
    """Divide, scale, add the base; returns how many results are not finite after the cast."""
    overflows = 0
    for j in range(width):
        divisor = ONE if abs(divisors[j]) < SMALLEST else divisors[j]
        value = base_factor * origin[j] + scale * (total[j] / divisor)
        result[j] = value
        overflows += not abs(value) < overflow
    return overflows


@_compiled
def _load(base: Floats, halves: Halves, start: int, width: int, origin: Floats) -> None:
    if len(halves):
        bits = origin.view(np.uint32)
        tile = halves[start : start + width]
        for j in range(len(tile)):
            bits[j] = np.uint32(tile[j]) << 16
    else:
        floats = base[start : start + width]
        for j in range(len(floats)):  # a slice assigned to a slice would take four times as long to compile
            origin[j] = floats[j]


@_compiled
def _store(result: Floats, start: int, width: int, out: Floats, halves: Halves) -> None:
    """Cast to bfloat16, to nearest even; a carry makes infinity by itself, and a NaN stays a (quiet) NaN."""
    if len(halves):
        bits = result.view(np.uint32)
        tile = halves[start : start + width]
        for j in range(len(tile)):
            value = bits[j]
            rounded = np.uint32(value + 0x7FFF + ((value >> 16) & 1)) >> 16
            nan = (value & 0x7FFF_FFFF) > 0x7F80_0000
            tile[j] = np.uint16((value >> 16) | 0x40 if nan else rounded)
    else:
        floats = out[start : start + width]
        for j in range(len(floats)):
            floats[j] = result[j]
