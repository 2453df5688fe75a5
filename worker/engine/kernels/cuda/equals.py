"""Where the equals that a source keeps end: the lowest flat indices stay, so equals are counted in flat order.

A chunk is a part of one row, and chunks are numbered row by row: that is flat order. One launch counts the equals of
every chunk, a second finds the chunk in which the last one kept lies, and its place there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.operands import (
    CUT,
    EQUALS,
    FIELDS,
    THRESHOLD,
    Operands,
    Tiling,
    delta_tile,
    magnitudes,
    tile_at,
)
from worker.engine.kernels.cuda.workspace import Workspace

WIDTH = 1024
STEP = 1024  # chunks looked at together


@triton.jit
def _count(
    table,
    divided,
    counts,
    rows,
    columns,
    WIDTH: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    source = tl.load(divided + tl.program_id(1))
    equal = _equal(tl.program_id(0), table, source, rows, columns, WIDTH, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
    tl.store(counts + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(equal.to(tl.int32), 0))


@triton.jit(do_not_specialize=["chunks"])
def _find(
    table,
    divided,
    counts,
    chunks,
    rows,
    columns,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    source = tl.load(divided + tl.program_id(0))
    entry = table + source * FIELDS
    wanted = tl.load(entry + EQUALS)
    counts += tl.program_id(0) * chunks
    passed = wanted * 0  # equals in the chunks before those looked at
    last = chunks + tl.program_id(0) * 0  # the chunk in which the last one kept lies
    left = wanted * 0  # which of that chunk's equals it is
    for first in range(0, chunks, STEP):
        chunk = first + tl.arange(0, STEP)
        here = tl.load(counts + chunk, mask=chunk < chunks, other=0).to(tl.int64)
        upto = passed + tl.cumsum(here, 0)
        reached = (here > 0) & (upto >= wanted) & (upto - here < wanted)  # in one chunk of all at most
        last = tl.minimum(last, tl.min(tl.where(reached, chunk, chunks), 0))
        left += tl.sum(tl.where(reached, wanted - (upto - here), 0), 0)
        passed += tl.sum(here, 0)

    cut = (wanted * 0 + rows) * columns  # where there are fewer equals all stay
    if last < chunks:
        equal = _equal(last, table, source, rows, columns, WIDTH, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
        upto = tl.cumsum(equal.to(tl.int32), 0)
        cut = (
            tile_at(last, rows, columns, 1, WIDTH, False)[2]
            + 1
            + tl.sum(tl.where(equal & (upto == left), tl.arange(0, WIDTH), 0), 0)
        )
    tl.store(entry + CUT, cut)


@triton.jit
def _equal(
    chunk,
    table,
    source,
    rows,
    columns,
    WIDTH: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Which values of a chunk equal the threshold, (WIDTH,)."""
    at = tile_at(chunk, rows, columns, 1, WIDTH, False)
    delta = delta_tile(table, source, rows, columns, at, 1, WIDTH, False, OPERANDS, OWN, ORIGIN, SCALED, ALIGNED)
    equal = at[4] & (magnitudes(delta) == tl.load(table + source * FIELDS + THRESHOLD).to(tl.int32))
    return tl.reshape(equal, (WIDTH,))


def find_cuts(operands: Operands, divided: list[int], workspace: Workspace) -> None:
    """Write into the table, for the sources ``divided``, the flat index after the last equal that stays."""
    chunks = Tiling(operands.rows, operands.columns, 1, WIDTH).count
    sources = workspace.empty(len(divided), torch.int32)
    sources.copy_(torch.tensor(divided, dtype=torch.int32))
    counts = workspace.empty(len(divided) * chunks, torch.int32)
    shape = (operands.rows, operands.columns)
    _count[(chunks, len(divided))](
        operands.table, sources, counts, *shape, WIDTH=WIDTH, num_warps=4, **operands.options
    )
    _find[(len(divided),)](
        operands.table, sources, counts, chunks, *shape, STEP=STEP, WIDTH=WIDTH, num_warps=4, **operands.options
    )
