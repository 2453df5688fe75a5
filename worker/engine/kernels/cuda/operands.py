"""What the kernels read of their sources: a table of addresses and numbers, and δ of a tile formed from it.

Addresses go to the device in a table and not as arguments, so that one compiled kernel serves any number of sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from worker.engine.kernels.cuda.workspace import Workspace
from worker.engine.kernels.signature import Delta, Difference, Product, Trim

PRODUCT, DIFFERENCE, DENSE, MIXED = (tl.constexpr(kind) for kind in range(4))
FLOAT32, FLOAT16, BFLOAT16, GIVEN = (tl.constexpr(code) for code in range(4))
# A row of the table, int64. Floats lie in it as their bits.
FIELDS = tl.constexpr(16)
KIND, FIRST, SECOND, FIRST_STEP, SECOND_STEP, RANK, SCALE = (tl.constexpr(field) for field in range(7))
THRESHOLD, CUT, EQUALS, RESCALE, WEIGHT, LOW, HIGH = (tl.constexpr(field) for field in range(7, 14))
MAGNITUDE = tl.constexpr(0x7FFF_FFFF)

CODES = {torch.float32: FLOAT32.value, torch.float16: FLOAT16.value, torch.bfloat16: BFLOAT16.value}
ONE = 0x3F80_0000  # 1.0 as its bits
WARPS = 4
ALIGNED_BYTES = 16  # what one thread loads or stores at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of ``height`` × ``width`` values over a block seen as ``rows`` × ``columns``.

    Of a product a thread holds ``height`` × 4 values: four columns side by side, so that it reads them of the right
    factor at once, and ``WARPS`` · 32 threads stand in a row. What only streams through is tiled as one row.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def across(self) -> int:
        return -(-self.columns // self.width)

    @property
    def count(self) -> int:
        return -(-self.rows // self.height) * self.across

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel is compiled for. Tiles that are all whole need no test of what lies inside."""
        even = self.rows % self.height == 0 and self.columns % self.width == 0
        return {"HEIGHT": self.height, "WIDTH": self.width, "EVEN": even, "num_warps": WARPS}


@dataclass(frozen=True, slots=True)
class Operands:
    """The sources of one call, on the device."""

    rows: int
    columns: int
    kind: int
    own: int  # dtype code of all own values
    origin: int  # dtype code of what they are differences to
    given: bool  # all of them to the base of the merge
    scaled: bool  # some difference is multiplied by something
    rescaled: bool  # what some trim keeps is multiplied by something
    aligned: bool
    table: torch.Tensor  # int64 (N, FIELDS)

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def tiling(self, height: int, width: int) -> Tiling:
        """Tiles of that shape for products, else of as many values in a row."""
        if self.kind in (PRODUCT.value, MIXED.value) and self.rows > 1:
            return Tiling(self.rows, self.columns, height, width)
        return Tiling(self.rows, self.columns, 1, height * width)

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel that forms δ is compiled for."""
        return {
            "OPERANDS": self.kind,
            "OWN": self.own,
            "ORIGIN": self.origin,
            "SCALED": self.scaled,
            "ALIGNED": self.aligned,
            # one rounding an operation: a product is never contracted with the sum it goes into
            "enable_fp_fusion": False,
        }


def lay_out(
    deltas: Sequence[Delta],
    workspace: Workspace,
    numbers: Sequence[dict[int, int]],
    base: torch.Tensor | None = None,
) -> Operands:
    """Stage the operands and write their table. ``numbers``: further fields of each source's row.

    ``base``: the one of the merge, on the device. Where all differences are to it, a tile reads it once.
    """
    rows, columns = _shape(deltas)
    owns = {delta.own.dtype for delta in deltas if isinstance(delta, Difference)}
    origins = {delta.base.dtype for delta in deltas if isinstance(delta, Difference)}
    entries = np.zeros((len(deltas), FIELDS.value), dtype=np.int64)
    aligned, given, kinds = True, base is not None, set()
    for entry, delta, further in zip(entries, deltas, numbers, strict=True):
        if isinstance(delta, Product):
            kind, first, second = PRODUCT.value, workspace.staged(delta.left), workspace.staged(delta.right)
            entry[FIRST_STEP.value], entry[SECOND_STEP.value] = first.stride(0), second.stride(0)
            entry[RANK.value] = first.shape[1]
            aligned &= second.stride(0) * second.itemsize % ALIGNED_BYTES == 0
        elif isinstance(delta, Difference):
            kind = DIFFERENCE.value
            first = _widened(workspace.staged(delta.own), owns)
            second = _widened(workspace.staged(delta.base), origins)
            given &= base is not None and second.data_ptr() == base.data_ptr() and second.dtype == base.dtype
        else:
            kind, first = DENSE.value, workspace.staged(delta)
            second = first
        workspace.hold(first, second)
        kinds.add(kind)
        # the left factor is read value by value
        aligned &= second.data_ptr() % ALIGNED_BYTES == 0 and (
            kind == PRODUCT.value or first.data_ptr() % ALIGNED_BYTES == 0
        )
        entry[KIND.value], entry[FIRST.value], entry[SECOND.value] = kind, first.data_ptr(), second.data_ptr()
        entry[SCALE.value] = bits(1.0 if isinstance(delta, torch.Tensor) else delta.scale)
        for field, value in further.items():
            entry[field] = value
    return Operands(
        rows=rows,
        columns=columns,
        kind=kinds.pop() if len(kinds) == 1 else MIXED.value,
        own=_code(owns),
        origin=_code(origins),
        given=given,
        scaled=any(isinstance(delta, Difference) and delta.scale != 1.0 for delta in deltas),
        rescaled=any(fields.get(RESCALE.value, ONE) != ONE for fields in numbers),
        aligned=aligned,
        table=workspace.upload(entries),
    )


def trim_numbers(trim: Trim, size: int) -> dict[int, int]:
    """A trim's fields. Where it keeps every equal magnitude the threshold says so, and there is nothing to divide."""
    limit = max(trim.threshold - 1, -1) if trim.equals >= size else trim.threshold
    equals = trim.equals if 0 < trim.equals < size and trim.threshold >= 0 else 0
    return {
        THRESHOLD.value: limit,
        EQUALS.value: equals,
        RESCALE.value: bits(trim.rescale),
    }


def size_of(delta: Delta) -> int:
    """n of the block."""
    if isinstance(delta, Product):
        return math.prod(shape_of(delta))
    return len(delta.own if isinstance(delta, Difference) else delta)


def shape_of(product: Product) -> tuple[int, int]:
    """Rows and columns."""
    return product.left.shape[0], product.right.shape[1]


def bits(value: float) -> int:
    """A float32's bits as they lie in a table."""
    return int(np.float32(value).view(np.int32))


def _shape(deltas: Sequence[Delta]) -> tuple[int, int]:
    """Rows and columns of the products; anything else is one row."""
    shapes = {shape_of(delta) for delta in deltas if isinstance(delta, Product)}
    assert len(shapes) <= 1, "the room sees to that"
    return shapes.pop() if shapes else (1, size_of(deltas[0]))


def _widened(values: torch.Tensor, dtypes: set[torch.dtype]) -> torch.Tensor:
    """Sources stored alike are read as they are; where they differ all are widened first, so that one load serves."""
    return values if len(dtypes) == 1 else values.float()


def _code(dtypes: set[torch.dtype]) -> int:
    return CODES[next(iter(dtypes))] if len(dtypes) == 1 else int(FLOAT32.value)


@triton.jit
def tile_at(index, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Where a tile lies: its first row and column, the flat index of its first value, the places of all its values
    from there (HEIGHT, WIDTH), and which of them there are. ``EVEN``: all."""
    across = tl.cdiv(columns, WIDTH)
    first_row = (index // across) * HEIGHT
    first_column = (index % across) * WIDTH
    down = tl.arange(0, HEIGHT)[:, None]
    along = tl.arange(0, WIDTH)[None, :]
    if EVEN:
        inside = tl.full((HEIGHT, WIDTH), True, tl.int1)
    else:
        inside = (down < rows - first_row) & (along < columns - first_column)
    return first_row, first_column, first_row.to(tl.int64) * columns + first_column, down * columns + along, inside


@triton.jit
def delta_tile(
    table,
    source,
    rows,
    columns,
    at,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    OPERANDS: tl.constexpr,
    OWN: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    given=None,
):
    """δ of one source over the tile ``at``, float32 (HEIGHT, WIDTH)."""
    entry = table + source * FIELDS
    if OPERANDS == PRODUCT:
        delta = _product(entry, rows, columns, at, HEIGHT, WIDTH, EVEN, ALIGNED)
    elif OPERANDS == DIFFERENCE:
        delta = _difference(entry, at, given, OWN, ORIGIN, SCALED, ALIGNED)
    elif OPERANDS == DENSE:
        delta = values_at(address(entry, FIRST, FLOAT32, ALIGNED), at, FLOAT32)
    else:
        kind = tl.load(entry + KIND)
        if kind == PRODUCT:
            delta = _product(entry, rows, columns, at, HEIGHT, WIDTH, EVEN, ALIGNED)
        elif kind == DIFFERENCE:
            delta = _difference(entry, at, given, OWN, ORIGIN, SCALED, ALIGNED)
        else:
            delta = values_at(address(entry, FIRST, FLOAT32, ALIGNED), at, FLOAT32)
    return delta


@triton.jit
def _product(
    entry,
    rows,
    columns,
    at,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The products of a value are added in the order of the rank; ``tl.dot`` would add them as the hardware likes."""
    first_row, first_column, _, _, _ = at
    left_step = tl.load(entry + FIRST_STEP)
    right_step = tl.load(entry + SECOND_STEP)
    if ALIGNED:
        right_step = tl.multiple_of(right_step, 4)
    down = tl.arange(0, HEIGHT)[:, None]
    along = tl.arange(0, WIDTH)[None, :]
    left = address(entry, FIRST, FLOAT32, False) + (first_row + down) * left_step
    right = address(entry, SECOND, FLOAT32, ALIGNED) + first_column + along
    if EVEN:
        has_row = tl.full((HEIGHT, 1), True, tl.int1)
        has_column = tl.full((1, WIDTH), True, tl.int1)
    else:
        has_row = down < rows - first_row
        has_column = along < columns - first_column
    # -0, to which a first product of -0 too adds as it is. (tl.full makes 0 of -0.0.)
    total = tl.full((HEIGHT, WIDTH), -0x8000_0000, tl.int32).to(tl.float32, bitcast=True)
    for k in tl.range(0, tl.load(entry + RANK).to(tl.int32), loop_unroll_factor=4):
        column = tl.load(left + k, mask=has_row, other=0.0)
        total = total + column * tl.load(right + k * right_step, mask=has_column, other=0.0)
    return number(entry, SCALE) * total


@triton.jit
def _difference(entry, at, given, OWN: tl.constexpr, ORIGIN: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr):
    own = values_at(address(entry, FIRST, OWN, ALIGNED), at, OWN)
    if ORIGIN == GIVEN:
        delta = own - given
    else:
        delta = own - values_at(address(entry, SECOND, ORIGIN, ALIGNED), at, ORIGIN)
    if SCALED:
        delta = delta * number(entry, SCALE)
    return delta


@triton.jit
def address(entry, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table. bfloat16 is read as its bits."""
    if DTYPE == FLOAT32:
        pointer = tl.load(entry + FIELD).to(tl.pointer_type(tl.float32))
    elif DTYPE == FLOAT16:
        pointer = tl.load(entry + FIELD).to(tl.pointer_type(tl.float16))
    else:
        pointer = tl.load(entry + FIELD).to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def values_at(pointer, at, DTYPE: tl.constexpr):
    """Stored values of a tile, widened to float32."""
    _, _, start, places, inside = at
    stored = tl.load(pointer + start + places, mask=inside, other=0)
    if DTYPE == BFLOAT16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def number(entry, FIELD: tl.constexpr):
    """A float32 out of the table."""
    return tl.load(entry + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def magnitudes(delta):
    """|δ| as its 31 bits."""
    return delta.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def survivors(table, source, delta, at, DIVIDED: tl.constexpr):
    """Which values of a tile the source's trim keeps, int32: all bits set, else none. (A mask of bits costs a thread no
    predicates, of which it has seven.) ``DIVIDED``: a source may keep only the first of its equals."""
    _, _, start, places, inside = at
    entry = table + source * FIELDS
    limit = tl.load(entry + THRESHOLD).to(tl.int32)
    if DIVIDED:
        limit = limit - ((start + places) < tl.load(entry + CUT)).to(tl.int32)
    return tl.where(inside, (limit - magnitudes(delta)) >> 31, 0)
