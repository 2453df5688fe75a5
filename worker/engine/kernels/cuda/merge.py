"""Trim, elect, merge, scale, add the base, cast: one launch, each value of the result written once.

A tile goes over its sources twice, to vote and to sum, and δ is never written to memory: of a few sources the votes
stay in registers, of more δ is formed anew. What a full fine-tune is formed from is then still in the caches; the r
products of an adapter's value cost 2·r of the 132·128 operations that an H100 does a clock, each time.

Counted in what is compiled for sm_90: four bfloat16 models take about 160 instructions a parameter, for 12 bytes of it.
An H100 does 29·10¹² of them a second, so arithmetic and not memory bounds it, near two thirds of its bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import (
    BFLOAT16,
    CODES,
    FIELDS,
    FLOAT16,
    GIVEN,
    WEIGHT,
    Operands,
    delta_tile,
    number,
    survivors,
    tile_at,
    values_at,
)
from worker.engine.kernels.cuda.voting import (
    ELECTIONS,
    NONE,
    cast_vote,
    elected_sign,
    kept_values,
    vote_of,
)
from worker.engine.kernels.cuda.workspace import Workspace
from worker.engine.kernels.signature import OVERFLOW, SMALLEST_DIVISOR, Rule

CONSTANT, AGREEING, AGREEING_WEIGHTS = (tl.constexpr(divisor) for divisor in range(3))
SMALLEST = tl.constexpr(float(torch.tensor(SMALLEST_DIVISOR, dtype=torch.float32)))
# So many sources' votes stay in a thread's registers from the election to the sum; more are formed a second time.
MOST_HELD = 4
# A sum of squares in float32 serves where no square that counts can have been lost to underflow, nor to overflow.
LEAST_SQUARES = tl.constexpr(2.0**-100)
MOST_SQUARES = tl.constexpr(2.0**100)
ACTIVE, CONFLICTS, OVERFLOWS = (tl.constexpr(place) for place in range(3))  # behind what each source kept


@dataclass(frozen=True, slots=True)
class Counted:
    """What a merge found, in one piece of the device's memory, so that one copy brings it to the host."""

    found: torch.Tensor  # int64 (2N + 4,), the last N + 1 the bits of float64
    sources: int

    def fetch(self) -> tuple[list[int], list[float]]:
        """What each source kept, then active, conflicts, tiles that overflow; squares of each source, of the change."""
        found, split = self.found.cpu(), self.sources + 3
        return found[:split].tolist(), found[split:].view(torch.float64).tolist()


@triton.jit(do_not_specialize=["count", "sources", "required"])
def _merge(
    table,
    count,
    base,
    out,
    counts,
    partials,
    rows,
    columns,
    base_factor,
    scale,
    divisor,
    zero_sign,
    sources,
    required,
    overflow,
    HELD: tl.constexpr,
    ELECTION: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVISOR: tl.constexpr,
    DIVIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tile = tl.program_id(0)
    at = tile_at(tile, rows, columns, HEIGHT, WIDTH, EVEN)
    partials += tile.to(tl.int64) * (count + 1)
    nothing = tl.zeros((HEIGHT, WIDTH), tl.float32)
    none = tl.zeros((HEIGHT, WIDTH), tl.int32)
    seen = (none, nothing, nothing)
    origin = values_at(base, at, BASE)
    mass, tally, total, shared = nothing, none, nothing, nothing

    if HELD > 0:
        held = ()
        for source in tl.static_range(HELD):
            delta = delta_tile(
                table, source, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED, origin
            )
            vote, seen = _look(table, source, delta, at, counts, partials, seen, WEIGH, DIVIDED, RESCALED)
            if ELECTION == NONE:
                total, shared = _add(table, source, total, shared, vote, vote != 0, WEIGH, DIVISOR)
            else:
                mass, tally = cast_vote(mass, tally, vote, ELECTION)
                held = held + (vote,)  # type: ignore[assignment]
        if ELECTION != NONE:
            elected = elected_sign(mass, tally, zero_sign, sources, required, ELECTION)
            for source in tl.static_range(HELD):
                vote = held[source]
                total, shared = _add(table, source, total, shared, vote, vote * elected > 0, WEIGH, DIVISOR)
    else:
        for source in range(count):
            delta = delta_tile(
                table, source, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED, origin
            )
            vote, seen = _look(table, source, delta, at, counts, partials, seen, WEIGH, DIVIDED, RESCALED)
            if ELECTION == NONE:
                total, shared = _add(table, source, total, shared, vote, vote != 0, WEIGH, DIVISOR)
            else:
                mass, tally = cast_vote(mass, tally, vote, ELECTION)
        if ELECTION != NONE:
            elected = elected_sign(mass, tally, zero_sign, sources, required, ELECTION)
            for source in range(count):
                delta = delta_tile(
                    table,
                    source,
                    rows,
                    columns,
                    at,
                    HEIGHT,
                    WIDTH,
                    EVEN,
                    OPERANDS,
                    OWN,
                    ORIGIN,
                    SCALED,
                    ALIGNED,
                    origin,
                )
                kept = survivors(table, source, delta, at, DIVIDED)
                vote = vote_of(table, source, kept_values(table, source, delta, kept, RESCALED), WEIGH)
                total, shared = _add(table, source, total, shared, vote, vote * elected > 0, WEIGH, DIVISOR)

    if DIVISOR == CONSTANT:
        merged = tl.div_rn(total, nothing + divisor)
    else:
        merged = tl.div_rn(total, tl.where(tl.abs(shared) < SMALLEST, 1.0, shared))
    result = base_factor * origin + scale * merged
    _store(out, at, result, OUT)

    present, highest, lowest = seen
    inside = at[4]
    active = inside & ((present & 0x7FFF_FFFF) != 0)
    conflicting = inside & (highest > 0) & (lowest < 0)
    # one reduction for both: a tile has fewer than 2**15 values
    both = tl.sum(active.to(tl.int32) + tl.where(conflicting, 1 << 16, 0))
    counts += count
    tl.atomic_add(counts + ACTIVE, (both & 0xFFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + CONFLICTS, (both >> 16).to(tl.int64), sem="relaxed")
    # A NaN is passed over here and shows in the square of the change.
    largest = tl.max(tl.where(inside, tl.abs(result), 0.0))
    tl.atomic_add(counts + OVERFLOWS, (largest >= overflow).to(tl.int64), sem="relaxed")
    tl.store(partials + count, _sum_of_squares(tl.where(inside, result - origin, 0.0)))


@triton.jit
def _look(
    table,
    source,
    delta,
    at,
    counts,
    partials,
    seen,
    WEIGH: tl.constexpr,
    DIVIDED: tl.constexpr,
    RESCALED: tl.constexpr,
):
    """A source's vote, and what is to be said of it: how many values it kept, their squares, and what all sources so
    far hold (``seen``: the bits of all kept values together, the highest and the lowest weighted value)."""
    tl.store(partials + source, _sum_of_squares(delta))
    kept = survivors(table, source, delta, at, DIVIDED)
    tl.atomic_add(counts + source, -tl.sum(kept).to(tl.int64), sem="relaxed")
    values = kept_values(table, source, delta, kept, RESCALED)
    vote = vote_of(table, source, values, WEIGH)
    weighted = _weighted(table, source, vote, WEIGH)
    present, highest, lowest = seen
    present |= values.to(tl.int32, bitcast=True)
    return vote, (present, tl.maximum(highest, weighted), tl.minimum(lowest, weighted))


@triton.jit
def _weighted(table, source, vote, WEIGH: tl.constexpr):
    """The vote as it is summed: with its weight, where the vote was without."""
    if WEIGH:
        return vote
    return number(table + source * FIELDS, WEIGHT) * vote


@triton.jit
def _add(table, source, total, shared, vote, agrees, WEIGH: tl.constexpr, DIVISOR: tl.constexpr):
    """The sum of what agrees so far, and what the divisor is so far."""
    total += tl.where(agrees, _weighted(table, source, vote, WEIGH), 0.0)
    if DIVISOR == AGREEING:
        shared += tl.where(agrees, 1.0, 0.0)
    if DIVISOR == AGREEING_WEIGHTS:
        shared += tl.where(agrees, number(table + source * FIELDS, WEIGHT), 0.0)
    return total, shared


@triton.jit
def _sum_of_squares(values):
    """Σ of a tile's squares, float64. Float32 squares add up to the same within 1e-6, and an H100 widens 16 values a
    clock where it does 128 float32 operations. Where float32's range may not do they are widened."""
    squares = tl.sum(tl.fma(values, values, tl.zeros_like(values)))
    found = squares.to(tl.float64)
    if (squares >= LEAST_SQUARES) & (squares <= MOST_SQUARES):
        pass
    else:
        wide = values.to(tl.float64)
        found = tl.sum(wide * wide)
    return found


@triton.jit
def _store(out, at, result, OUT: tl.constexpr):
    """Cast to nearest even. bfloat16 is rounded by whole numbers: a carry makes infinity by itself, and a NaN stays a
    (quiet) NaN. (Triton's interpreter rounds halves of it away from even.)"""
    _, _, start, places, inside = at
    if OUT == BFLOAT16:
        bits = result.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves = tl.where((bits & 0x7FFF_FFFF) > 0x7F80_0000, (bits >> 16) | 0x40, rounded)
        tl.store(out + start + places, halves.to(tl.int16), mask=inside)
    elif OUT == FLOAT16:
        tl.store(out + start + places, result.to(tl.float16), mask=inside)
    else:
        tl.store(out + start + places, result, mask=inside)


def merge(
    operands: Operands,
    base: torch.Tensor,
    weights: Sequence[float],
    rule: Rule,
    out: torch.Tensor,
    *,
    divided: bool,
    workspace: Workspace,
) -> Counted:
    """``base`` and ``out`` on the device."""
    tiling = operands.tiling(4, 512)
    count = len(weights)
    found = workspace.zeros(2 * count + 4, torch.int64)
    partials = workspace.empty(tiling.count * (count + 1), torch.float64).view(tiling.count, count + 1)
    kind, divisor = _divisor(weights, rule)
    _merge[(tiling.count,)](
        operands.table,
        count,
        _bits(base),
        _bits(out),
        found,
        partials,
        tiling.rows,
        tiling.columns,
        _float32(rule.base),
        _float32(rule.scale),
        divisor,
        float(rule.zero_sign),
        rule.sources,
        rule.required,
        _float32(OVERFLOW[out.dtype]),
        HELD=count if count <= MOST_HELD else 0,
        ELECTION=ELECTIONS[rule.elect],
        WEIGH=rule.weigh_votes,
        DIVISOR=kind,
        DIVIDED=divided,
        RESCALED=operands.rescaled,
        BASE=CODES[base.dtype],
        OUT=CODES[out.dtype],
        **tiling.options,
        **operands.options | ({"ORIGIN": GIVEN.value} if operands.given else {}),
    )
    torch.sum(partials, 0, out=found[count + 3 :].view(torch.float64))
    return Counted(found, count)


def _divisor(weights: Sequence[float], rule: Rule) -> tuple[int, float]:
    """What a parameter's sum is divided by: what kind of number, and the number itself where it is one for all."""
    if rule.divisor == "agreeing":
        return AGREEING.value, 1.0
    if rule.divisor == "agreeing_weights":
        return AGREEING_WEIGHTS.value, 1.0
    constant = {"none": 1.0, "sources": float(rule.sources), "weights": sum(weights)}[rule.divisor]
    return CONSTANT.value, 1.0 if abs(_float32(constant)) < SMALLEST.value else _float32(constant)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 as the int16 that the kernels read and write."""
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values
