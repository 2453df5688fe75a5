"""The ``cpu`` room: Numba loops over tiles that stay in the first-level cache, one thread a call, without the GIL.

Four sources are read at once, so that what is known of a parameter is loaded and stored once for all four (a whole call
took 1.2 ns a value of Δ against 2.05 ns source by source: best of 40, four sources, an AMD Zen 3 core). Every loop is
elementwise over one tile, so LLVM vectorises it without reordering a sum: fastmath stays off and the numbers equal the
reference's bit for bit. Floats are reinterpreted as integers through array views, and bfloat16, which NumPy does not
know, goes through uint16.
Float16 is converted by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch

from worker.engine.kernels.signature import (
    KEEP_NONE,
    SMALLEST_DIVISOR,
    BlockStatistics,
    Delta,
    Difference,
    Elect,
    Product,
    Rule,
    Trim,
)

P = ParamSpec("P")
R = TypeVar("R")
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.uint16]  # bfloat16 bits
Words = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

# Float64 sums: value i goes to lane i % LANES in flat order, then lanes add up in order. This many stay in the
# first-level cache beside the values, and are enough not to wait for each other.
LANES = 128
# What a tile needs stays in the first-level cache. A whole number of LANES.
TILE = 1024
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
POSITIVE, NEGATIVE, BOTH, ACTIVE = np.int32(1), np.int32(2), np.int32(3), np.int32(4)
# What is known of a tile's parameters lies in one array, each at a fixed place: LLVM sees that the places are apart,
# and the loops need no test for it. Unsigned indices need none for being negative.
SLOTS = 9
MASS_AT, TALLY_AT, MARKS_AT, TOTAL_AT, DIVISORS_AT, ELECTED_AT, ORIGIN_AT, RESULT_AT, CHANGE_AT = (
    np.uint64(slot * TILE) for slot in range(SLOTS)
)


class CpuKernels:
    """The ``cpu`` room; see ``signature.Kernels`` for shapes and meanings."""

    name = "cpu"

    def place(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def form(self, delta: Delta, out: torch.Tensor) -> None:
        _form(delta, out)

    def histogram(self, delta: Delta, counts: torch.Tensor, prefix: int | None) -> None:
        values = _formed([delta])[0].numpy()
        if prefix is None:
            _coarse_histogram(values, counts.numpy())
        else:
            _fine_histogram(values, counts.numpy(), prefix)

    def collect(
        self, deltas: Sequence[Delta], brackets: Sequence[tuple[int, int]], found: torch.Tensor
    ) -> list[tuple[int, int]]:
        counts = []
        for values, (low, high), row in zip(_formed(deltas), brackets, found, strict=True):
            above, inside = _collect(values.numpy(), low, high, row.numpy())
            counts.append((int(above), int(inside)))
        return counts

    def count_equal(self, delta: Delta, threshold: int) -> int:
        return int(_count_equal(_formed([delta])[0].numpy(), threshold))

    def kept_l1(self, delta: Delta, trim: Trim) -> float:
        values = _formed([delta])[0].numpy()
        return float(_kept_l1(values, trim.threshold, _cut(values, trim.threshold, trim.equals)))

    def elected_balance(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], rule: Rule
    ) -> int:
        formed = _formed(deltas)
        rows, stride = _rows(formed)
        before, _ = _factors(weights, rule)
        return int(
            _elected_balance(
                rows,
                stride,
                formed.shape[0],
                formed.shape[1],
                *_trim_arrays(formed, trims),
                before,
                COUNT if rule.elect == "none" else ELECTIONS[rule.elect],
                rule.sources,
                rule.required,
            )
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
        formed = _formed(deltas)
        rows, stride = _rows(formed)
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
            formed.shape[1],
            *_trim_arrays(formed, trims),
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


def _formed(deltas: Sequence[Delta]) -> torch.Tensor:
    """float32 (N, n)."""
    if len(deltas) == 1 and isinstance(deltas[0], torch.Tensor):
        return deltas[0][None]
    formed = torch.empty(len(deltas), _size(deltas[0]))
    for delta, row in zip(deltas, formed, strict=True):
        _form(delta, row)
    return formed


def _size(delta: Delta) -> int:
    match delta:
        case Product(left, right):
            return left.shape[0] * right.shape[1]
        case Difference(own):
            return len(own)
        case values:
            return len(values)


def _form(delta: Delta, out: torch.Tensor) -> None:
    match delta:
        case Product(left, right, scale):
            _form_product(left.numpy(), right.numpy(), np.float32(scale), out.numpy())
        case Difference(own, base, scale):
            torch.sub(own.float(), base.float(), out=out).mul_(torch.tensor(scale, dtype=torch.float32))
        case values:
            out.copy_(values)


def _rows(deltas: torch.Tensor) -> tuple[Floats, int]:
    """All rows as one flat array and the step between them: one array type to compile for, whatever the step."""
    count, n = deltas.shape
    step = deltas.stride(0) if count > 1 else n
    return deltas.as_strided(((count - 1) * step + n,), (1,)).numpy(), step


def _trim_arrays(deltas: torch.Tensor, trims: Sequence[Trim]) -> tuple[Words, Longs, Floats]:
    """Thresholds, cuts (see ``_cut``) and factors of the survivors, for each source and up to a multiple of four."""
    count = len(trims) + -len(trims) % 4
    thresholds = np.full(count, KEEP_NONE.threshold, dtype=np.int32)
    cuts = np.zeros(count, dtype=np.int64)
    for s, trim in enumerate(trims):
        thresholds[s] = trim.threshold
        cuts[s] = _cut(deltas[s].numpy(), trim.threshold, trim.equals)
    return thresholds, cuts, _padded([trim.rescale for trim in trims])


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


def _divisor(weights: Sequence[float], rule: Rule) -> tuple[np.float32, Floats]:
    """The divisor before any source agrees, and what each adds where it does."""
    own = _padded(weights)
    nothing = np.zeros_like(own)
    if rule.divisor == "agreeing":
        return ZERO, nothing + ONE
    if rule.divisor == "agreeing_weights":
        return ZERO, own
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


def _inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Part of the loop that calls it."""
    inlined: Callable[P, R] = numba.njit(inline="always", error_model="numpy")(function)
    return inlined


@_compiled
def _form_product(left: Floats, right: Floats, scale: np.float32, out: Floats) -> None:
    rank, columns = right.shape
    for row in range(len(left)):
        values = out[row * columns : (row + 1) * columns]
        factor = left[row, 0]
        for j in range(columns):
            values[j] = factor * right[0, j]
        for k in range(1, rank):
            factor = left[row, k]
            for j in range(columns):
                values[j] += factor * right[k, j]
        for j in range(columns):
            values[j] *= scale


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
def _collect(delta: Floats, low: int, high: int, found: Words) -> tuple[int, int]:
    """Few values lie inside: they are flagged as in ``_fine_histogram``, and written without a branch of their own."""
    bits = delta.view(np.int32)
    least, most = np.int32(low), np.int32(high)
    flags = np.zeros(TILE, dtype=np.uint8)
    words = flags.view(np.uint64)
    above = 0
    inside = 0
    for start in range(0, len(bits), TILE):
        tile = bits[start : start + TILE]
        over = np.int32(0)
        for j in range(len(tile)):
            over = np.int32(over + np.int32((tile[j] & MAGNITUDE) > most))
        above += int(over)
        for j in range(len(tile)):
            magnitude = tile[j] & MAGNITUDE
            flags[j] = (magnitude >= least) & (magnitude <= most)
        for w in range(-(-len(tile) // 8)):
            if words[w] != 0:
                for j in range(8 * w, min(8 * w + 8, len(tile))):
                    if inside < len(found):  # behind the last one inside
                        found[inside] = tile[j] & MAGNITUDE
                    inside += flags[j]
    return above, inside


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
    lanes = np.zeros(LANES, dtype=np.float64)
    for start in range(0, len(delta), TILE):
        tile = delta[start : start + TILE]
        kept[:] = ZERO  # beyond the end of the last tile too
        _keep(tile, np.int32(threshold), cut - start, kept)
        for first in range(0, TILE, LANES):
            part = kept[first : first + LANES]
            for j in range(LANES):
                lanes[j] += np.float64(abs(part[j]))
    return _lanes_sum(lanes)


@_compiled
def _keep(tile: Floats, threshold: np.int32, cut: int, kept: Floats) -> None:
    """Trim into ``kept``. ``cut`` counts from the start of the tile."""
    middle = min(max(cut, 0), len(tile))
    _keep_above(tile[:middle], np.int32(threshold - 1), kept)
    _keep_above(tile[middle:], threshold, kept[middle:])


@_compiled
def _keep_above(tile: Floats, limit: np.int32, kept: Floats) -> None:
    bits = tile.view(np.int32)
    for j in range(len(tile)):
        kept[j] = tile[j] if (bits[j] & MAGNITUDE) > limit else ZERO


@_compiled
def _elected_balance(
    rows: Floats,
    stride: int,
    count: int,
    n: int,
    thresholds: Words,
    cuts: Longs,
    rescales: Floats,
    before: Floats,
    election: int,
    sources: int,
    required: int,
) -> int:
    work = np.zeros(SLOTS * TILE, dtype=np.float32)
    counts = np.zeros(4, dtype=np.int32)
    limits = np.empty_like(thresholds)
    balance = 0
    at = 0
    while at < n:
        end = _part(at, n, thresholds, cuts, limits)
        _clear(work, end - at, ZERO)
        for s in range(0, count, 4):
            _vote(
                rows,
                stride,
                s,
                min(4, count - s),
                at,
                end - at,
                limits,
                rescales,
                before,
                before,
                election,
                work,
                counts,
            )
        _elect(election, sources, required, ZERO, end - at, work)
        for j in range(end - at):
            balance += int(work[ELECTED_AT + j])
        at = end
    return balance


@_compiled
def _part(at: int, n: int, thresholds: Words, cuts: Longs, limits: Words) -> int:
    """Where the part of a tile ends that begins at ``at``, and what magnitudes must exceed there: it ends early where
    the equals that a source keeps do, so that each source has one limit."""
    end = min(at - at % TILE + TILE, n)
    for s in range(len(cuts)):
        if at < cuts[s] < end:
            end = cuts[s]
    for s in range(len(limits)):
        limits[s] = thresholds[s] - 1 if at < cuts[s] else thresholds[s]
    return end


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
    """Tile by tile: trim and vote four sources at a time, elect, sum four at a time, divide, add the base, cast."""
    count = len(squares)
    work = np.zeros(SLOTS * TILE, dtype=np.float32)
    counts = np.zeros(4, dtype=np.int32)
    limits = np.empty_like(thresholds)
    square_lanes = np.zeros((count, LANES), dtype=np.float64)
    merged_lanes = np.zeros(LANES, dtype=np.float64)
    active = 0
    conflicts = 0
    overflows = 0

    at = 0
    while at < n:
        end = _part(at, n, thresholds, cuts, limits)
        width = end - at
        for s in range(count):
            _add_squares(rows[s * stride + at : s * stride + end], square_lanes[s], at % LANES)
        _clear(work, width, divisor)
        for s in range(0, count, 4):
            _vote(
                rows, stride, s, min(4, count - s), at, width, limits, rescales, before, after, election, work, counts
            )
            for i in range(min(4, count - s)):
                kept_counts[s + i] += counts[i]
        if election != NONE:
            _elect(election, sources, required, zero_sign, width, work)
        for s in range(0, count, 4):
            _sum(rows, stride, s, min(4, count - s), at, width, limits, rescales, before, after, shares, election, work)
        _load(base, base_halves, at, width, work)
        found = _finish(base_factor, scale, overflow, width, work)
        active += found[0]
        conflicts += found[1]
        overflows += found[2]
        _add_squares(work[CHANGE_AT : CHANGE_AT + np.uint64(width)], merged_lanes, at % LANES)
        _store(work, at, width, out, out_halves)
        at = end

    for s in range(count):
        squares[s] = _lanes_sum(square_lanes[s])
    return active, conflicts, _lanes_sum(merged_lanes), overflows == 0


@_compiled
def _add_squares(values: Floats, lanes: Doubles, lane: int) -> None:
    """Add squares to the lanes, the first value's to ``lane``. Whole rounds have a loop of a known length."""
    head = min((LANES - lane) % LANES, len(values))
    for j in range(head):
        value = np.float64(values[j])
        lanes[lane + j] += value * value
    whole = head + (len(values) - head) // LANES * LANES
    for first in range(head, whole, LANES):
        part = values[first : first + LANES]
        for j in range(LANES):
            value = np.float64(part[j])
            lanes[j] += value * value
    for j in range(whole, len(values)):
        value = np.float64(values[j])
        lanes[j - whole + (lane if head == len(values) else 0)] += value * value


@_compiled
def _clear(work: Floats, width: int, divisor: np.float32) -> None:
    words = work.view(np.int32)
    for j in range(np.uint64(width)):
        work[j + MASS_AT] = ZERO
        words[j + TALLY_AT] = 0
        words[j + MARKS_AT] = 0
        work[j + TOTAL_AT] = ZERO
        work[j + DIVISORS_AT] = divisor


@_compiled
def _vote(
    rows: Floats,
    stride: int,
    first: int,
    present: int,
    at: int,
    width: int,
    limits: Words,
    rescales: Floats,
    before: Floats,
    after: Floats,
    election: int,
    work: Floats,
    counts: Words,
) -> None:
    """The votes of up to four sources: values into ``MASS``, or signs into ``TALLY`` (+ low, - in the high 16 bits).

    A source that is missing reads the first one's values and keeps none.
    """
    words = work.view(np.int32)
    bits = rows.view(np.int32)
    p0 = np.uint64(first * stride + at)
    p1 = np.uint64((first + (1 if present > 1 else 0)) * stride + at)
    p2 = np.uint64((first + (2 if present > 2 else 0)) * stride + at)
    p3 = np.uint64((first + (3 if present > 3 else 0)) * stride + at)
    t0, t1, t2, t3 = limits[first], limits[first + 1], limits[first + 2], limits[first + 3]
    r0, r1, r2, r3 = rescales[first], rescales[first + 1], rescales[first + 2], rescales[first + 3]
    b0, b1, b2, b3 = before[first], before[first + 1], before[first + 2], before[first + 3]
    a0, a1, a2, a3 = after[first], after[first + 1], after[first + 2], after[first + 3]
    c0 = c1 = c2 = c3 = np.int32(0)
    if election <= MASS:  # without an election the marks alone are of use
        for j in range(np.uint64(width)):
            s0 = (bits[p0 + j] & MAGNITUDE) > t0
            s1 = (bits[p1 + j] & MAGNITUDE) > t1
            s2 = (bits[p2 + j] & MAGNITUDE) > t2
            s3 = (bits[p3 + j] & MAGNITUDE) > t3
            k0 = rows[p0 + j] * r0 if s0 else ZERO
            k1 = rows[p1 + j] * r1 if s1 else ZERO
            k2 = rows[p2 + j] * r2 if s2 else ZERO
            k3 = rows[p3 + j] * r3 if s3 else ZERO
            c0 = np.int32(c0 + np.int32(s0))
            c1 = np.int32(c1 + np.int32(s1))
            c2 = np.int32(c2 + np.int32(s2))
            c3 = np.int32(c3 + np.int32(s3))
            v0, v1, v2, v3 = b0 * k0, b1 * k1, b2 * k2, b3 * k3
            work[j + MASS_AT] = (((work[j + MASS_AT] + v0) + v1) + v2) + v3
            words[j + MARKS_AT] |= _marks(k0, k1, k2, k3, a0 * v0, a1 * v1, a2 * v2, a3 * v3)
    else:
        for j in range(np.uint64(width)):
            s0 = (bits[p0 + j] & MAGNITUDE) > t0
            s1 = (bits[p1 + j] & MAGNITUDE) > t1
            s2 = (bits[p2 + j] & MAGNITUDE) > t2
            s3 = (bits[p3 + j] & MAGNITUDE) > t3
            k0 = rows[p0 + j] * r0 if s0 else ZERO
            k1 = rows[p1 + j] * r1 if s1 else ZERO
            k2 = rows[p2 + j] * r2 if s2 else ZERO
            k3 = rows[p3 + j] * r3 if s3 else ZERO
            c0 = np.int32(c0 + np.int32(s0))
            c1 = np.int32(c1 + np.int32(s1))
            c2 = np.int32(c2 + np.int32(s2))
            c3 = np.int32(c3 + np.int32(s3))
            v0, v1, v2, v3 = b0 * k0, b1 * k1, b2 * k2, b3 * k3
            words[j + TALLY_AT] += _sign(v0) + _sign(v1) + _sign(v2) + _sign(v3)
            words[j + MARKS_AT] |= _marks(k0, k1, k2, k3, a0 * v0, a1 * v1, a2 * v2, a3 * v3)
    counts[0], counts[1], counts[2], counts[3] = c0, c1, c2, c3


@_inlined
def _sign(vote: np.float32) -> np.int32:
    return np.int32((np.int32(1) if vote > ZERO else np.int32(0)) + (np.int32(65536) if vote < ZERO else np.int32(0)))


@_inlined
def _marks(
    k0: np.float32,
    k1: np.float32,
    k2: np.float32,
    k3: np.float32,
    w0: np.float32,
    w1: np.float32,
    w2: np.float32,
    w3: np.float32,
) -> np.int32:
    """Whether any of four kept values is not zero, and whether any of them, weighted, is positive or negative."""
    positive = (w0 > ZERO) | (w1 > ZERO) | (w2 > ZERO) | (w3 > ZERO)
    negative = (w0 < ZERO) | (w1 < ZERO) | (w2 < ZERO) | (w3 < ZERO)
    present = (k0 != ZERO) | (k1 != ZERO) | (k2 != ZERO) | (k3 != ZERO)
    return np.int32(
        (POSITIVE if positive else np.int32(0))
        | (NEGATIVE if negative else np.int32(0))
        | (ACTIVE if present else np.int32(0))
    )


@_compiled
def _elect(election: int, sources: int, required: int, even: np.float32, width: int, work: Floats) -> None:
    """The elected sign of each parameter of a tile: +1, -1, or 0; ``even`` where neither outweighs the other."""
    words = work.view(np.int32)
    if election == MASS:
        for j in range(np.uint64(width)):
            mass = work[j + MASS_AT]
            work[j + ELECTED_AT] = ONE if mass > ZERO else (-ONE if mass < ZERO else even)
        return
    least = np.int32(0)
    most = np.int32(1 << 16)
    if election == UNANIMOUS:
        least = most = np.int32(sources)
    elif election == QUORUM:
        least = np.int32(required)
    for j in range(np.uint64(width)):
        positive = words[j + TALLY_AT] & np.int32(0xFFFF)
        negative = words[j + TALLY_AT] >> np.int32(16)
        sign = ONE if positive > negative else (-ONE if positive < negative else even)
        holding = positive if sign > ZERO else negative
        work[j + ELECTED_AT] = sign if (least <= holding) & (holding <= most) else ZERO


@_compiled
def _sum(
    rows: Floats,
    stride: int,
    first: int,
    present: int,
    at: int,
    width: int,
    limits: Words,
    rescales: Floats,
    before: Floats,
    after: Floats,
    shares: Floats,
    election: int,
    work: Floats,
) -> None:
    """The sum of what agrees, of up to four sources, and what they add to the divisor. They are trimmed once more:
    that takes less time than keeping what was trimmed."""
    bits = rows.view(np.int32)
    p0 = np.uint64(first * stride + at)
    p1 = np.uint64((first + (1 if present > 1 else 0)) * stride + at)
    p2 = np.uint64((first + (2 if present > 2 else 0)) * stride + at)
    p3 = np.uint64((first + (3 if present > 3 else 0)) * stride + at)
    t0, t1, t2, t3 = limits[first], limits[first + 1], limits[first + 2], limits[first + 3]
    r0, r1, r2, r3 = rescales[first], rescales[first + 1], rescales[first + 2], rescales[first + 3]
    b0, b1, b2, b3 = before[first], before[first + 1], before[first + 2], before[first + 3]
    a0, a1, a2, a3 = after[first], after[first + 1], after[first + 2], after[first + 3]
    h0, h1, h2, h3 = shares[first], shares[first + 1], shares[first + 2], shares[first + 3]
    if election == NONE:
        for j in range(np.uint64(width)):
            v0 = b0 * (rows[p0 + j] * r0 if (bits[p0 + j] & MAGNITUDE) > t0 else ZERO)
            v1 = b1 * (rows[p1 + j] * r1 if (bits[p1 + j] & MAGNITUDE) > t1 else ZERO)
            v2 = b2 * (rows[p2 + j] * r2 if (bits[p2 + j] & MAGNITUDE) > t2 else ZERO)
            v3 = b3 * (rows[p3 + j] * r3 if (bits[p3 + j] & MAGNITUDE) > t3 else ZERO)
            total = work[j + TOTAL_AT]
            work[j + TOTAL_AT] = (((total + a0 * v0) + a1 * v1) + a2 * v2) + a3 * v3
            shared = work[j + DIVISORS_AT] + (h0 if v0 != ZERO else ZERO)
            shared += h1 if v1 != ZERO else ZERO
            shared += h2 if v2 != ZERO else ZERO
            shared += h3 if v3 != ZERO else ZERO
            work[j + DIVISORS_AT] = shared
    else:
        for j in range(np.uint64(width)):
            v0 = b0 * (rows[p0 + j] * r0 if (bits[p0 + j] & MAGNITUDE) > t0 else ZERO)
            v1 = b1 * (rows[p1 + j] * r1 if (bits[p1 + j] & MAGNITUDE) > t1 else ZERO)
            v2 = b2 * (rows[p2 + j] * r2 if (bits[p2 + j] & MAGNITUDE) > t2 else ZERO)
            v3 = b3 * (rows[p3 + j] * r3 if (bits[p3 + j] & MAGNITUDE) > t3 else ZERO)
            elected = work[j + ELECTED_AT]
            g0, g1, g2, g3 = v0 * elected > ZERO, v1 * elected > ZERO, v2 * elected > ZERO, v3 * elected > ZERO
            total = work[j + TOTAL_AT] + (a0 * v0 if g0 else ZERO)
            total += a1 * v1 if g1 else ZERO
            total += a2 * v2 if g2 else ZERO
            total += a3 * v3 if g3 else ZERO
            work[j + TOTAL_AT] = total
            shared = work[j + DIVISORS_AT] + (h0 if g0 else ZERO)
            shared += h1 if g1 else ZERO
            shared += h2 if g2 else ZERO
            shared += h3 if g3 else ZERO
            work[j + DIVISORS_AT] = shared


@_compiled
def _finish(
    base_factor: np.float32, scale: np.float32, overflow: np.float32, width: int, work: Floats
) -> tuple[int, int, int]:
    """Divide, scale, add the base. How many parameters are active, how many in conflict, and how many results are
    not finite after the cast."""
    words = work.view(np.int32)
    active = conflicts = overflows = np.int32(0)
    for j in range(np.uint64(width)):
        divisor = work[j + DIVISORS_AT]
        divisor = ONE if abs(divisor) < SMALLEST else divisor
        origin = work[j + ORIGIN_AT]
        value = base_factor * origin + scale * (work[j + TOTAL_AT] / divisor)
        work[j + RESULT_AT] = value
        work[j + CHANGE_AT] = value - origin
        marks = words[j + MARKS_AT]
        active = np.int32(active + (np.int32(1) if marks >= ACTIVE else np.int32(0)))
        conflicts = np.int32(conflicts + (np.int32(1) if (marks & BOTH) == BOTH else np.int32(0)))
        overflows = np.int32(overflows + (np.int32(0) if abs(value) < overflow else np.int32(1)))
    return int(active), int(conflicts), int(overflows)


@_compiled
def _load(base: Floats, halves: Halves, start: int, width: int, work: Floats) -> None:
    words = work.view(np.uint32)
    if len(halves):
        tile = halves[start : start + width]
        for j in range(np.uint64(width)):
            words[j + ORIGIN_AT] = np.uint32(tile[j]) << np.uint32(16)
    else:
        floats = base[start : start + width]
        for j in range(np.uint64(width)):  # a slice assigned to a slice would take four times as long to compile
            work[j + ORIGIN_AT] = floats[j]


@_compiled
def _store(work: Floats, start: int, width: int, out: Floats, halves: Halves) -> None:
    """Cast to bfloat16, to nearest even; a carry makes infinity by itself, and a NaN stays a (quiet) NaN."""
    if len(halves):
        words = work.view(np.uint32)
        tile = halves[start : start + width]
        for j in range(np.uint64(width)):
            value = words[j + RESULT_AT]
            odd = (value >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(np.uint32(value + np.uint32(0x7FFF)) + odd) >> np.uint32(16)
            nan = (value & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000)
            tile[j] = np.uint16((value >> np.uint32(16)) | np.uint32(0x40) if nan else rounded)
    else:
        floats = out[start : start + width]
        for j in range(np.uint64(width)):
            floats[j] = work[j + RESULT_AT]
