"""The L1 norm of what a trim keeps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import Operands, delta_tile, survivors, tile_at
from worker.engine.kernels.cuda.workspace import Workspace


@triton.jit
def _kept_l1(
    table,
    partials,
    rows,
    columns,
    DIVIDED: tl.constexpr,
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
    delta = delta_tile(table, 0, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
    kept = survivors(table, 0, delta, at, DIVIDED)
    values = tl.where(kept != 0, tl.abs(delta), 0.0).to(tl.float64)
    tl.store(partials + tile, tl.sum(values))


def kept_l1(operands: Operands, *, divided: bool, workspace: Workspace) -> torch.Tensor:
    """float64, a scalar on the device. Tiles are summed in a fixed order: no atomics."""
    tiling = operands.tiling(8, 512)
    partials = workspace.empty(tiling.count, torch.float64)
    _kept_l1[(tiling.count,)](
        operands.table,
        partials,
        tiling.rows,
        tiling.columns,
        DIVIDED=divided,
        **tiling.options,
        **operands.options,
    )
    return partials.sum()
