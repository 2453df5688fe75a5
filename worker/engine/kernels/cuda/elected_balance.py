"""The sum of the elected signs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import Operands, delta_tile, survivors, tile_at
from worker.engine.kernels.cuda.voting import COUNT, ELECTIONS, cast_vote, elected_sign, kept_values, vote_of
from worker.engine.kernels.signature import Rule


@triton.jit(do_not_specialize=["count", "sources", "required"])
def _elected_balance(
    table,
    count,
    balance,
    rows,
    columns,
    sources,
    required,
    ELECTION: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    at = tile_at(tl.program_id(0), rows, columns, HEIGHT, WIDTH, EVEN)
    mass = tl.zeros((HEIGHT, WIDTH), tl.float32)
    tally = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for source in range(count):
        delta = delta_tile(
            table, source, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED
        )
        kept = survivors(table, source, delta, at, DIVIDED)
        vote = vote_of(table, source, kept_values(table, source, delta, kept, RESCALED), WEIGH)
        mass, tally = cast_vote(mass, tally, vote, ELECTION)
    sign = elected_sign(mass, tally, 0.0, sources, required, ELECTION)
    # beyond the block no vote is cast, so the sign there is 0
    tl.atomic_add(balance, tl.sum(sign.to(tl.int32)).to(tl.int64), sem="relaxed")


def elected_balance(operands: Operands, rule: Rule, balance: torch.Tensor, *, divided: bool) -> None:
    """Into ``balance``, int64 (1,) of zero on the device."""
    tiling = operands.tiling(4, 512)
    _elected_balance[(tiling.count,)](
        operands.table,
        len(operands.table),
        balance,
        tiling.rows,
        tiling.columns,
        rule.sources,
        rule.required,
        ELECTION=COUNT.value if rule.elect == "none" else ELECTIONS[rule.elect],
        WEIGH=rule.weigh_votes,
        DIVIDED=divided,
        RESCALED=operands.rescaled,
        **tiling.options,
        **operands.options,
    )
