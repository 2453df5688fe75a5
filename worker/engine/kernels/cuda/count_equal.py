"""How many magnitudes equal a threshold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import THRESHOLD, Operands, delta_tile, magnitudes, tile_at


@triton.jit
def _count_equal(
    table,
    count,
    rows,
    columns,
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
    delta = delta_tile(table, 0, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
    equal = at[4] & (magnitudes(delta) == tl.load(table + THRESHOLD).to(tl.int32))
    tl.atomic_add(count, tl.sum(equal.to(tl.int32)).to(tl.int64), sem="relaxed")


def count_equal(operands: Operands, count: torch.Tensor) -> None:
    """Into ``count``, int64 (1,) of zero on the device."""
    tiling = operands.tiling(8, 512)
    _count_equal[(tiling.count,)](
        operands.table,
        count,
        tiling.rows,
        tiling.columns,
        **tiling.options,
        **operands.options,
    )
