"""δ itself, for methods that look at it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import Operands, delta_tile, tile_at


@triton.jit
def _form(
    table,
    out,
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
    _, _, start, places, inside = at
    tl.store(out + start + places, delta, mask=inside)


def form(operands: Operands, out: torch.Tensor) -> None:
    """``out``: float32 (n,) on the device."""
    tiling = operands.tiling(8, 512)
    _form[(tiling.count,)](
        operands.table,
        out,
        tiling.rows,
        tiling.columns,
        **tiling.options,
        **operands.options,
    )
