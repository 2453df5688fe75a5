"""The magnitudes that lie in a bracket, of all sources in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import FIELDS, HIGH, LOW, Operands, delta_tile, magnitudes, tile_at


@triton.jit(do_not_specialize=["step", "room"])
def _collect(
    table,
    found,
    step,
    room,
    counts,
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
    source = tl.program_id(1)
    at = tile_at(tl.program_id(0), rows, columns, HEIGHT, WIDTH, EVEN)
    delta = delta_tile(table, source, rows, columns, at, HEIGHT, WIDTH, EVEN, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
    bits, inside = magnitudes(delta), at[4]
    low = tl.load(table + source * FIELDS + LOW).to(tl.int32)
    high = tl.load(table + source * FIELDS + HIGH).to(tl.int32)
    tl.atomic_add(counts + 2 * source, tl.sum((inside & (bits > high)).to(tl.int32)).to(tl.int64), sem="relaxed")

    # One atomic a tile makes room for all that it found. A value's place in there is counted down its column, which
    # one thread holds, behind the columns before it.
    chosen = inside & (bits >= low) & (bits <= high)
    upto = tl.cumsum(chosen.to(tl.int32), 0)
    columnwise = tl.sum(chosen.to(tl.int32), 0)
    ends = tl.cumsum(columnwise, 0)
    first = tl.atomic_add(counts + 2 * source + 1, tl.max(ends, 0).to(tl.int64), sem="relaxed").to(tl.int32)
    place = (first - 1 + ends - columnwise)[None, :] + upto
    tl.store(found + source.to(tl.int64) * step + place, bits, mask=chosen & (place < room))


def collect(operands: Operands, found: torch.Tensor, counts: torch.Tensor) -> None:
    """Into ``found``, int32 (N, m), and ``counts``, int64 (N, 2) of zeros: above, inside. Both on the device."""
    tiling = operands.tiling(8, 512)
    _collect[(tiling.count, len(found))](
        operands.table,
        found,
        found.stride(0),
        found.shape[1],
        counts,
        tiling.rows,
        tiling.columns,
        **tiling.options,
        **operands.options,
    )
