"""What the election and the merge share: a source's vote over a tile, and the sign that the votes elect."""

from __future__ import annotations

import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import FIELDS, RESCALE, WEIGHT, number
from worker.engine.kernels.signature import Elect

NONE, MASS, COUNT, UNANIMOUS, QUORUM = (tl.constexpr(election) for election in range(5))
ELECTIONS: dict[Elect, int] = {
    "none": NONE.value,
    "mass": MASS.value,
    "count": COUNT.value,
    "unanimous": UNANIMOUS.value,
    "quorum": QUORUM.value,
}


@triton.jit
def kept_values(table, source, delta, kept, RESCALED: tl.constexpr):
    """What ``survivors`` keeps of δ, times the trim's factor, else 0."""
    if RESCALED:
        delta = delta * number(table + source * FIELDS, RESCALE)
    return (delta.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True)


@triton.jit
def vote_of(table, source, values, WEIGH: tl.constexpr):
    if WEIGH:
        return number(table + source * FIELDS, WEIGHT) * values
    return values


@triton.jit
def cast_vote(mass, tally, vote, ELECTION: tl.constexpr):
    """The votes so far and one more: their sum, or how many are positive (low 16 bits) and negative (high 16)."""
    if ELECTION == MASS:
        mass += vote
    else:
        tally += tl.where(vote > 0, 1, 0) + tl.where(vote < 0, 1 << 16, 0)
    return mass, tally


@triton.jit
def elected_sign(mass, tally, even, sources, required, ELECTION: tl.constexpr):
    """+1, -1 or 0 for each parameter, float32; ``even`` where neither sign outweighs the other."""
    if ELECTION == MASS:
        return tl.where(mass > 0, 1.0, tl.where(mass < 0, -1.0, even))
    positive = tally & 0xFFFF
    negative = tally >> 16
    sign = tl.where(positive > negative, 1.0, tl.where(positive < negative, -1.0, even))
    if ELECTION == UNANIMOUS:
        sign = tl.where(tl.maximum(positive, negative) == sources, sign, 0.0)
    if ELECTION == QUORUM:
        sign = tl.where(tl.where(sign > 0, positive, negative) >= required, sign, 0.0)
    return sign
