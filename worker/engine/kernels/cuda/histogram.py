"""Counts of magnitudes by the upper or the lower bits, for the exact selection of a threshold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import Operands, delta_tile, magnitudes, tile_at
from worker.engine.kernels.cuda.workspace import Workspace

# A bin that many values fall into is one address for all of them. So many copies of the counts share it; 4 MB of them
# at most stay in the second-level cache.
COPIES = 16


@triton.jit(do_not_specialize=["prefix"])
def _histogram(
    table,
    copies,
    rows,
    columns,
    prefix,
    COPIES: tl.constexpr,
    BINS: tl.constexpr,
    FINE: tl.constexpr,
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
    bits, inside = magnitudes(delta), at[4]
    own = copies + (tile % COPIES) * BINS
    if FINE:
        tl.atomic_add(own + (bits & 0xFFFF), 1, mask=inside & ((bits >> 16) == prefix), sem="relaxed")
    else:
        tl.atomic_add(own + (bits >> 16), 1, mask=inside, sem="relaxed")


def histogram(operands: Operands, counts: torch.Tensor, prefix: int | None, workspace: Workspace) -> None:
    """Add to ``counts``, int64 on the device."""
    tiling = operands.tiling(8, 512)
    bins = len(counts)
    copies = workspace.zeros(COPIES * bins, torch.int32)
    _histogram[(tiling.count,)](
        operands.table,
        copies,
        tiling.rows,
        tiling.columns,
        prefix or 0,
        COPIES=COPIES,
        BINS=bins,
        FINE=prefix is not None,
        **tiling.options,
        **operands.options,
    )
    counts += copies.view(COPIES, bins).sum(0)
