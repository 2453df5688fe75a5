"""The loops of the ``cpu`` room, compiled by Numba: one thread a call, without the GIL, nothing but tiles in between.

A block is worked on tile by tile: some rows of a panel of columns, so that what a tile needs stays in the first-level
cache, and the part of a product's right factor that all tiles of a panel read lies together (whole rows of it would
fall into the same few sets of the cache). A tile's δ is formed, and what follows is elementwise over it: four sources
are read at once, so that what is known of a parameter is loaded and stored once for all four, and LLVM vectorises
every loop without reordering a sum. fastmath stays off, and nothing is fused, so the numbers are the reference's bit
for bit. Three loops are written in vector instructions: products keep their sums in registers over the whole rank,
magnitudes are gathered by the compress instruction, and squares are summed in float64.

Floats are reinterpreted as integers through array views, and bfloat16, which NumPy does not know, goes through uint16.
All that is compiled stands in this one file, its constants too: Numba keeps compiled code until the file of its own
function changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.uint16]  # bfloat16 bits
Words = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

TILE = 2048  # values of a source: a tile of four sources, and what is known of its parameters, stay in the caches
PANEL = 512  # columns of a product's tile: long enough lines, and a panel of a right factor of rank 16 is 32 KB
LANES = 16  # float32 in a register of 512 bits; LLVM splits vectors where registers are smaller
ROWS, HALVES = 4, 4  # of a product's register block: rows, and vectors in each (a tenth faster than two vectors)
MAGNITUDE = np.int32(0x7FFF_FFFF)
ZERO = np.float32(0)
ONE = np.float32(1)

NONE, MASS, COUNT, UNANIMOUS, QUORUM = range(5)  # elections
# An operand is one row of ``operands``: what kind of δ it is, two addresses, the steps between their rows in values
# (0 and 1 instead, for a difference: whether the values are bfloat16), and the rank.
DENSE, PRODUCT, DIFFERENCE = range(3)
KIND, FIRST, SECOND, FIRST_STEP, SECOND_STEP, RANK = range(6)
# What is known of a tile's parameters lies in one array, each at a fixed place: LLVM sees that the places are apart,
# and the loops need no test for it. Unsigned indices need none for being negative. The votes become the elected sign,
# the total the result, and the divisors what changed; high and low are the extremes of what was kept, marks its bits.
SLOTS = 7
VOTES_AT, MARKS_AT, HIGH_AT, LOW_AT, TOTAL_AT, DIVISORS_AT, ORIGIN_AT = (
    np.uint64(slot * TILE) for slot in range(SLOTS)
)
MASS_AT = TALLY_AT = ELECTED_AT = VOTES_AT
RESULT_AT, CHANGE_AT = TOTAL_AT, DIVISORS_AT

_FLOAT, _WORD, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Numba, compiled at the first call and cached on disk where any folder can be written.

    ``error_model="numpy"`` leaves out the test for a zero divisor, which would keep the loop from vectorising.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        found: Callable[P, R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder is writable
        found = numba.njit(**options)(function)
    return found


def _inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Part of the loop that calls it."""
    inlined: Callable[P, R] = numba.njit(inline="always", error_model="numpy")(function)
    return inlined


def _instructions(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a function of the types of its arguments says: its signature, and how to write its instructions."""
    instructions: Callable[..., Any] = intrinsic(function)
    return instructions


@_instructions
def _floats_at(_context: Any, address: Any) -> Any:
    """The address of float32 values as a pointer, for ``carray``."""
    return types.CPointer(types.float32)(address), _as_pointer


@_instructions
def _halves_at(_context: Any, address: Any) -> Any:
    return types.CPointer(types.uint16)(address), _as_pointer


def _as_pointer(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@_instructions
def _multiply(
    _context: Any,
    left: Any,
    left_step: Any,
    right: Any,
    right_step: Any,
    rank: Any,
    scale: Any,
    out: Any,
    out_step: Any,
) -> Any:
    """``ROWS`` by ``HALVES`` · ``LANES`` values of scale · left · right, the sums held in registers.

    Addresses of float32; steps from row to row, in bytes.
    """
    places = [(row, half) for row in range(ROWS) for half in range(HALVES)]

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        left, left_step, right, right_step, rank, scale, out, out_step = arguments
        sums = {place: cgutils.alloca_once(builder, _FLOATS) for place in places}

        def products(k: ir.Value) -> Iterator[tuple[tuple[int, int], ir.Value]]:
            line, column = builder.add(right, builder.mul(k, right_step)), builder.add(left, builder.mul(k, _int64(4)))
            rights = [_load(builder, builder.add(line, _int64(4 * LANES * half)), _FLOATS) for half in range(HALVES)]
            for row in range(ROWS):
                place = builder.add(column, builder.mul(_int64(row), left_step))
                factor = _splat(builder, _load(builder, place, _FLOAT), _FLOATS)
                for half in range(HALVES):
                    yield (row, half), builder.fmul(factor, rights[half])

        for place, value in products(_int64(0)):
            builder.store(value, sums[place])
        with cgutils.for_range_slice(builder, _int64(1), rank, _int64(1), _INDEX) as (k, _):
            for place, value in products(k):
                builder.store(builder.fadd(builder.load(sums[place], typ=_FLOATS), value), sums[place])
        factor = _splat(builder, scale, _FLOATS)
        for (row, half), total in sums.items():
            place = builder.add(out, builder.add(builder.mul(_int64(row), out_step), _int64(4 * LANES * half)))
            _store(builder, builder.fmul(factor, builder.load(total, typ=_FLOATS)), place)
        return context.get_dummy_value()

    return types.void(left, left_step, right, right_step, rank, scale, out, out_step), generate


@_instructions
def _gather(_context: Any, values: Any, low: Any, high: Any, out: Any) -> Any:
    """Of ``LANES`` magnitudes those from ``low`` to ``high`` go to ``out``, where as many have room.

    How many they are, and 2³² times how many exceed ``high``. Addresses of int32; the bounds are int32.
    """

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        values, low, high, out = arguments
        magnitudes = builder.and_(_load(builder, values, _WORDS), ir.Constant(_WORDS, [0x7FFF_FFFF] * LANES))
        above = builder.icmp_signed(">", magnitudes, _splat(builder, high, _WORDS))
        inside = builder.icmp_signed(">=", magnitudes, _splat(builder, low, _WORDS))
        inside = builder.and_(inside, builder.not_(above))
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_WORDS, [_WORDS, ir.VectorType(ir.IntType(1), LANES), _WORDS]),
            f"llvm.experimental.vector.compress.v{LANES}i32",
        )
        _store(builder, builder.call(compress, [magnitudes, inside, magnitudes]), out)
        counts = [
            builder.ctpop(builder.zext(builder.bitcast(flags, ir.IntType(LANES)), _INDEX)) for flags in (above, inside)
        ]
        return builder.or_(builder.shl(counts[0], _int64(32)), counts[1])

    return types.int64(values, low, high, out), generate


@_instructions
def _square_sum(_context: Any, values: Any, size: Any) -> Any:
    """Σ values² of ``size`` float32 (a multiple of ``LANES``) from an address on: ``LANES`` sums, then their sum."""
    wide = ir.VectorType(ir.DoubleType(), LANES)

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        values, size = arguments
        sums = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * LANES))
        with cgutils.for_range_slice(builder, _int64(0), size, _int64(LANES), _INDEX) as (i, _):
            place = builder.add(values, builder.mul(i, _int64(4)))
            value = builder.fpext(_load(builder, place, _FLOATS), wide)
            builder.store(builder.fadd(builder.load(sums, typ=wide), builder.fmul(value, value)), sums)
        adding = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), wide]),
            f"llvm.vector.reduce.fadd.v{LANES}f64",
        )
        return builder.call(adding, [ir.Constant(ir.DoubleType(), 0.0), builder.load(sums, typ=wide)])

    return types.float64(values, size), generate


def _int64(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    values = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    values.align = 4
    return values


def _store(builder: ir.IRBuilder, values: ir.Value, address: ir.Value) -> None:
    builder.store(values, builder.inttoptr(address, values.type.as_pointer())).align = 4


def _splat(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    nothing = ir.Constant(kind, ir.Undefined)
    everywhere = ir.Constant(_WORDS, [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.Constant(_WORD, 0)), nothing, everywhere)


@compiled
def form(operands: Longs, scales: Floats, rows: int, columns: int, out: Floats) -> None:
    """δ of one operand. ``rows`` · ``columns`` values, as for all that follows."""
    tile, packed = np.empty(TILE, dtype=np.float32), _room(operands, columns)
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        _form(operands, scales, 0, row, height, column, width, columns, packed, tile, 0)
        for i in range(height):
            flat, place = np.uint64((row + i) * columns + column), np.uint64(i * width)
            for j in range(np.uint64(width)):
                out[flat + j] = tile[place + j]


@compiled
def coarse_histogram(operands: Longs, scales: Floats, rows: int, columns: int, counts: Longs) -> None:
    """Four interleaved histograms: two equal values in a row do not wait for each other (13 ms against 19 ms for
    16 M normal values, 16 against 26 where half are zero)."""
    tile, packed = np.zeros(TILE, dtype=np.float32), _room(operands, columns)
    bits = tile.view(np.int32)
    lanes = np.zeros((4, len(counts)), dtype=np.uint32)
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        _form(operands, scales, 0, row, height, column, width, columns, packed, tile, 0)
        size = height * width
        whole = size // 4 * 4
        for i in range(0, whole, 4):
            lanes[0, (bits[i] & MAGNITUDE) >> 16] += np.uint32(1)
            lanes[1, (bits[i + 1] & MAGNITUDE) >> 16] += np.uint32(1)
            lanes[2, (bits[i + 2] & MAGNITUDE) >> 16] += np.uint32(1)
            lanes[3, (bits[i + 3] & MAGNITUDE) >> 16] += np.uint32(1)
        for i in range(whole, size):
            lanes[0, (bits[i] & MAGNITUDE) >> 16] += np.uint32(1)
    for lane in range(4):
        for j in range(len(counts)):
            counts[j] += lanes[lane, j]


@compiled
def fine_histogram(operands: Longs, scales: Floats, rows: int, columns: int, prefix: int, counts: Longs) -> None:
    """Few values lie in the coarse bin: they are gathered first."""
    tile, packed = np.zeros(TILE, dtype=np.float32), _room(operands, columns)
    inside = np.empty(TILE + LANES, dtype=np.int32)
    low = prefix << 16
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        _form(operands, scales, 0, row, height, column, width, columns, packed, tile, 0)
        _, count = _gather_tile(tile, 0, height * width, low, low | 0xFFFF, inside)
        for i in range(count):
            counts[inside[i] & 0xFFFF] += 1


@compiled
def collect(
    operands: Longs, scales: Floats, rows: int, columns: int, brackets: Words, found: Words, counts: Longs
) -> None:
    """``brackets`` (N, 2) from low to high; ``counts`` (N, 2) take how many are above and inside."""
    tile, packed = np.empty(TILE, dtype=np.float32), _room(operands, columns)
    inside = np.empty(TILE + LANES, dtype=np.int32)
    counts[:] = 0
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        for s in range(len(operands)):
            _form(operands, scales, s, row, height, column, width, columns, packed, tile, 0)
            above, count = _gather_tile(tile, 0, height * width, brackets[s, 0], brackets[s, 1], inside)
            place = np.uint64(counts[s, 1])
            for j in range(np.uint64(max(0, min(count, found.shape[1] - counts[s, 1])))):
                found[np.uint64(s), place + j] = inside[j]
            counts[s, 0] += above
            counts[s, 1] += count


@compiled
def count_equal(operands: Longs, scales: Floats, rows: int, columns: int, threshold: int) -> int:
    tile, packed = np.empty(TILE, dtype=np.float32), _room(operands, columns)
    bits = tile.view(np.int32)
    wanted = np.int32(threshold)
    count = 0
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        _form(operands, scales, 0, row, height, column, width, columns, packed, tile, 0)
        here = np.int32(0)
        for j in range(np.uint64(height * width)):
            here = np.int32(here + np.int32((bits[j] & MAGNITUDE) == wanted))
        count += int(here)
    return count


@compiled
def cut(values: Floats, threshold: int, equals: int) -> int:
    """The flat index after the last kept value equal to the threshold: before it equals are kept, from it none."""
    bits = values.view(np.int32)
    wanted = np.int32(threshold)
    left = equals
    for i in range(len(bits)):
        left -= (bits[i] & MAGNITUDE) == wanted
        if left == 0:
            return i + 1
    return len(bits)


@compiled
def kept_l1(operands: Longs, scales: Floats, rows: int, columns: int, threshold: int, cut: int) -> float:
    tile, packed = np.empty(TILE, dtype=np.float32), _room(operands, columns)
    bits = tile.view(np.int32)
    total = 0.0
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        _form(operands, scales, 0, row, height, column, width, columns, packed, tile, 0)
        size = height * width
        limit, _ = _limit(tile, 0, row, height, column, width, columns, threshold, cut)
        for j in range(np.uint64(size)):
            tile[j] = abs(tile[j]) if (bits[j] & MAGNITUDE) > limit else ZERO
        for j in range(size):
            total += np.float64(tile[j])
    return total


@compiled
def elected_balance(
    operands: Longs,
    scales: Floats,
    rows: int,
    columns: int,
    thresholds: Words,
    cuts: Longs,
    rescales: Floats,
    before: Floats,
    election: int,
    sources: int,
    required: int,
) -> int:
    count = len(operands)
    deltas, packed = np.zeros(count * TILE, dtype=np.float32), _room(operands, columns)
    work = np.zeros(SLOTS * TILE, dtype=np.float32)
    counts = np.zeros(4, dtype=np.int32)
    limits = thresholds.copy()
    balance = 0
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        size = height * width
        for s in range(count):
            _form(operands, scales, s, row, height, column, width, columns, packed, deltas, s * TILE)
            limits[s], _ = _limit(deltas, s * TILE, row, height, column, width, columns, thresholds[s], cuts[s])
        for s in range(0, count, 4):
            _vote(deltas, s, min(4, count - s), size, limits, rescales, before, before, election, work, counts)
        _elect(election, sources, required, ZERO, size, work)
        for j in range(np.uint64(size)):
            balance += int(work[ELECTED_AT + j])
    return balance


@compiled
def merge(
    operands: Longs,
    scales: Floats,
    rows: int,
    columns: int,
    base: Floats,
    base_halves: Halves,
    thresholds: Words,
    cuts: Longs,
    rescales: Floats,
    before: Floats,
    after: Floats,
    election: int,
    sources: int,
    required: int,
    zero_sign: np.float32,
    divisor: np.float32,
    shares: Floats,
    base_factor: np.float32,
    scale: np.float32,
    smallest: np.float32,
    overflow: np.float32,
    plain: bool,
    out: Floats,
    out_halves: Halves,
    kept: Longs,
    squares: Doubles,
) -> tuple[int, int, float, bool]:
    """Tile by tile: form, trim and vote four sources at a time, elect, sum four at a time, divide, add, cast.

    What belongs to each source is padded to a multiple of four. ``base`` and ``out`` are given as float32 or as
    bfloat16, and the other is empty. ``plain``: at most four sources vote by mass, with no factor but their weights,
    and a sum of zero elects +, as most recipes of TIES have it. ``kept`` and ``squares`` are filled.
    """
    count = len(operands)
    deltas, packed = np.zeros(count * TILE, dtype=np.float32), _room(operands, columns)
    work = np.zeros(SLOTS * TILE, dtype=np.float32)
    counts = np.zeros(4, dtype=np.int32)
    limits = thresholds.copy()
    merged_square = 0.0
    active = 0
    conflicts = 0
    overflows = 0
    kept[:] = 0
    squares[:] = 0.0
    for number in range(_tiles(rows, columns)):
        row, height, column, width = _tile(number, rows, columns)
        _pack(operands, row, column, width, packed)
        size = height * width
        for s in range(count):
            _form(operands, scales, s, row, height, column, width, columns, packed, deltas, s * TILE)
            squares[s] += _squares(deltas, s * TILE, size)
            limits[s], dropped = _limit(deltas, s * TILE, row, height, column, width, columns, thresholds[s], cuts[s])
            kept[s] -= dropped
        for i in range(height):
            _widen(base, base_halves, (row + i) * columns + column, i * width, width, work)
        if plain:
            found = _merge_few(
                deltas,
                count,
                size,
                limits,
                before,
                divisor,
                shares,
                base_factor,
                scale,
                smallest,
                overflow,
                work,
                counts,
            )
            for i in range(count):
                kept[i] += counts[i]
        else:
            for s in range(0, count, 4):
                _vote(deltas, s, min(4, count - s), size, limits, rescales, before, after, election, work, counts)
                for i in range(min(4, count - s)):
                    kept[s + i] += counts[i]
            if election != NONE:
                _elect(election, sources, required, zero_sign, size, work)
            for s in range(0, count, 4):
                present = min(4, count - s)
                _sum(deltas, s, present, size, limits, rescales, before, after, divisor, shares, election, work)
            found = _finish(base_factor, scale, smallest, overflow, size, work)
        active += found[0]
        conflicts += found[1]
        overflows += found[2]
        merged_square += _squares(work, int(CHANGE_AT), size)
        for i in range(height):
            _narrow(work, i * width, (row + i) * columns + column, width, out, out_halves)
    return active, conflicts, merged_square, overflows == 0


@_inlined
def _tiles(rows: int, columns: int) -> int:
    width = min(columns, PANEL if rows > 1 else TILE)
    return -(-columns // width) * -(-rows // (TILE // width))


@compiled
def _tile(number: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """The first row, the rows, the first column and the columns of a tile: panel after panel, each from the top."""
    full = min(columns, PANEL if rows > 1 else TILE)
    step = TILE // full
    panel, part = divmod(number, -(-rows // step))
    row, column = part * step, panel * full
    return row, min(step, rows - row), column, min(full, columns - column)


@compiled
def _room(operands: Longs, columns: int) -> Floats:
    """For a panel of every product's right factor."""
    return np.empty(operands[:, RANK].sum() * min(columns, TILE), dtype=np.float32)


@compiled
def _pack(operands: Longs, row: int, column: int, width: int, packed: Floats) -> None:
    """A panel of the right factors, one after the other, once for all its tiles."""
    if row > 0:
        return
    at = np.uint64(0)
    for s in range(len(operands)):
        for k in range(operands[s, RANK]):
            place = operands[s, SECOND] + 4 * (k * operands[s, SECOND_STEP] + column)
            line = carray(_floats_at(place), (width,), np.float32)
            for j in range(np.uint64(width)):
                packed[at + j] = line[j]
            at += np.uint64(width)


@compiled
def _form(
    operands: Longs,
    scales: Floats,
    source: int,
    row: int,
    height: int,
    column: int,
    width: int,
    columns: int,
    packed: Floats,
    tiles: Floats,
    at: int,
) -> None:
    """δ of one tile of one operand, from ``tiles[at]`` on."""
    kind, first, second = operands[source, KIND], operands[source, FIRST], operands[source, SECOND]
    first_step, second_step = operands[source, FIRST_STEP], operands[source, SECOND_STEP]
    scale = scales[source]
    if kind == PRODUCT:
        before = 0
        for s in range(source):
            before += operands[s, RANK]
        left = first + 4 * row * first_step
        _form_product(left, first_step, operands[source, RANK], scale, height, width, packed, before * width, tiles, at)
        return
    for i in range(height):
        flat = (row + i) * columns + column
        place = np.uint64(at + i * width)
        if kind == DENSE:
            line = carray(_floats_at(first + 4 * flat), (width,), np.float32)
            for j in range(np.uint64(width)):
                tiles[place + j] = line[j]
        else:
            _form_difference(first, first_step, second, second_step, scale, flat, width, tiles, place)


@compiled
def _form_product(
    left: int,
    step: int,
    rank: int,
    scale: np.float32,
    height: int,
    width: int,
    packed: Floats,
    first: int,
    tiles: Floats,
    at: int,
) -> None:
    """``left``: the address of the tile's first row; its right factor is a panel of ``packed`` from ``first`` on."""
    right, out = np.int64(packed.ctypes.data) + 4 * first, np.int64(tiles.ctypes.data) + 4 * at
    whole_rows, whole_columns = height // ROWS * ROWS, width // (LANES * HALVES) * (LANES * HALVES)
    line_bytes = np.int64(4 * width)
    for j in range(0, whole_columns, LANES * HALVES):
        for i in range(0, whole_rows, ROWS):
            _multiply(
                left + 4 * i * step,
                4 * step,
                right + 4 * j,
                line_bytes,
                rank,
                scale,
                out + i * line_bytes + 4 * j,
                line_bytes,
            )
    for i in range(height):
        begin = whole_columns if i < whole_rows else 0
        rest, place = np.uint64(width - begin), np.uint64(at + i * width + begin)
        if rest > 0:
            factors = carray(_floats_at(left + 4 * i * step), (rank,), np.float32)
            line = np.uint64(first + begin)
            for j in range(rest):
                tiles[place + j] = factors[0] * packed[line + j]
            for k in range(1, rank):
                line += np.uint64(width)
                for j in range(rest):
                    tiles[place + j] += factors[k] * packed[line + j]
            for j in range(rest):
                tiles[place + j] *= scale


@compiled
def _form_difference(
    own: int,
    own_is_half: int,
    base: int,
    base_is_half: int,
    scale: np.float32,
    flat: int,
    width: int,
    tiles: Floats,
    at: np.uint64,
) -> None:
    bits = tiles.view(np.uint32)
    if own_is_half:
        halves = carray(_halves_at(own + 2 * flat), (width,), np.uint16)
        for j in range(np.uint64(width)):
            bits[at + j] = np.uint32(halves[j]) << np.uint32(16)
    else:
        floats = carray(_floats_at(own + 4 * flat), (width,), np.float32)
        for j in range(np.uint64(width)):
            tiles[at + j] = floats[j]
    if base_is_half:
        base_halves = carray(_halves_at(base + 2 * flat), (width,), np.uint16)
        for j in range(np.uint64(width)):
            origin = _as_float(np.uint32(np.uint32(base_halves[j]) << np.uint32(16)))
            tiles[at + j] = (tiles[at + j] - origin) * scale
    else:
        base_floats = carray(_floats_at(base + 4 * flat), (width,), np.float32)
        for j in range(np.uint64(width)):
            tiles[at + j] = (tiles[at + j] - base_floats[j]) * scale


@_instructions
def _as_float(_context: Any, bits: Any) -> Any:
    """A uint32's bits as a float32."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(bits), generate


@_instructions
def _bits(_context: Any, value: Any) -> Any:
    """A float32's bits as an int32."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(arguments[0], _WORD)

    return types.int32(value), generate


@compiled
def _gather_tile(tile: Floats, at: int, size: int, low: int, high: int, inside: Words) -> tuple[int, int]:
    """How many magnitudes are above the bracket, and how many inside, which go to the front of ``inside``."""
    bits = tile.view(np.int32)
    least, most = np.int32(low), np.int32(high)
    values, out = np.int64(tile.ctypes.data) + 4 * at, np.int64(inside.ctypes.data)
    whole = size // LANES * LANES
    above = 0
    count = 0
    for j in range(0, whole, LANES):
        found = _gather(values + 4 * j, least, most, out + 4 * count)
        above += found >> 32
        count += found & 0xFFFF_FFFF
    for j in range(at + whole, at + size):
        magnitude = bits[j] & MAGNITUDE
        above += magnitude > most
        if least <= magnitude <= most:
            inside[count] = magnitude
            count += 1
    return above, count


@compiled
def _limit(
    tiles: Floats,
    at: int,
    row: int,
    height: int,
    column: int,
    width: int,
    columns: int,
    threshold: int,
    cut: int,
) -> tuple[np.int32, int]:
    """What magnitudes must exceed to be kept, all over a tile.

    Values equal to the threshold are kept up to the flat index ``cut``. Where that is inside the tile, those after it
    become zero; and how many zeros are kept although they should not be, should zero be the threshold.
    """
    if cut <= row * columns + column:
        return np.int32(threshold), 0
    dropped = 0
    if cut < (row + height - 1) * columns + column + width:
        bits = tiles.view(np.int32)
        for i in range(height):
            flat = (row + i) * columns + column
            for j in range(max(0, cut - flat), width):
                if (bits[at + i * width + j] & MAGNITUDE) == threshold:
                    bits[at + i * width + j] = 0
                    dropped += threshold == 0
    return np.int32(threshold - 1), dropped


@compiled
def _squares(tiles: Floats, at: int, size: int) -> float:
    """Σ values², in float64."""
    whole = size // LANES * LANES
    total: float = _square_sum(np.int64(tiles.ctypes.data) + 4 * at, whole)
    for j in range(at + whole, at + size):
        total += np.float64(tiles[j]) * np.float64(tiles[j])
    return total


@compiled
def _merge_few(
    deltas: Floats,
    present: int,
    size: int,
    limits: Words,
    weights: Floats,
    divisor: np.float32,
    shares: Floats,
    base_factor: np.float32,
    scale: np.float32,
    smallest: np.float32,
    overflow: np.float32,
    work: Floats,
    counts: Words,
) -> tuple[int, int, int]:
    """``_vote``, ``_elect``, ``_sum`` and ``_finish`` in one loop, where ``plain``: 80 instructions for 16
    parameters, all of a parameter in registers.

    Where the sum is negative all signs are turned, so that what agrees is what is positive. Rounding is symmetric: the
    numbers are those of the four loops, bit for bit.
    """
    bits = deltas.view(np.int32)
    p0 = np.uint64(0)
    p1 = np.uint64(TILE if present > 1 else 0)
    p2 = np.uint64(2 * TILE if present > 2 else 0)
    p3 = np.uint64(3 * TILE if present > 3 else 0)
    t0, t1, t2, t3 = limits[0], limits[1], limits[2], limits[3]
    b0, b1, b2, b3 = weights[0], weights[1], weights[2], weights[3]
    h0, h1, h2, h3 = shares[0], shares[1], shares[2], shares[3]
    c0 = c1 = c2 = c3 = np.int32(0)
    active = conflicts = overflows = np.int32(0)
    for j in range(np.uint64(size)):
        s0 = (bits[p0 + j] & MAGNITUDE) > t0
        s1 = (bits[p1 + j] & MAGNITUDE) > t1
        s2 = (bits[p2 + j] & MAGNITUDE) > t2
        s3 = (bits[p3 + j] & MAGNITUDE) > t3
        c0, c1 = np.int32(c0 + np.int32(s0)), np.int32(c1 + np.int32(s1))
        c2, c3 = np.int32(c2 + np.int32(s2)), np.int32(c3 + np.int32(s3))
        v0, v1 = b0 * (deltas[p0 + j] if s0 else ZERO), b1 * (deltas[p1 + j] if s1 else ZERO)
        v2, v3 = b2 * (deltas[p2 + j] if s2 else ZERO), b3 * (deltas[p3 + j] if s3 else ZERO)
        turned = np.uint32(0x8000_0000) if ((v0 + v1) + v2) + v3 < ZERO else np.uint32(0)
        x0, x1 = _turn(v0, turned), _turn(v1, turned)
        x2, x3 = _turn(v2, turned), _turn(v3, turned)
        g0, g1, g2, g3 = x0 > ZERO, x1 > ZERO, x2 > ZERO, x3 > ZERO
        agree = g0 | g1 | g2 | g3
        differ = (x0 < ZERO) | (x1 < ZERO) | (x2 < ZERO) | (x3 < ZERO)
        total = x0 if g0 else ZERO
        total += x1 if g1 else ZERO
        total += x2 if g2 else ZERO
        total += x3 if g3 else ZERO
        shared = divisor
        shared += h0 if g0 else ZERO
        shared += h1 if g1 else ZERO
        shared += h2 if g2 else ZERO
        shared += h3 if g3 else ZERO
        shared = ONE if abs(shared) < smallest else shared
        merged = _turn(total, turned) / shared
        origin = work[j + ORIGIN_AT]
        value = base_factor * origin + scale * merged
        work[j + RESULT_AT] = value
        work[j + CHANGE_AT] = value - origin
        active = np.int32(active + np.int32(agree | differ))
        conflicts = np.int32(conflicts + np.int32(agree & differ))
        overflows = np.int32(overflows + (np.int32(0) if abs(value) < overflow else np.int32(1)))
    counts[0], counts[1], counts[2], counts[3] = c0, c1, c2, c3
    return int(active), int(conflicts), int(overflows)


@_inlined
def _turn(value: np.float32, sign: np.uint32) -> np.float32:
    """The value, with its sign turned where ``sign`` has that bit."""
    turned: np.float32 = _as_float(np.uint32(np.uint32(_bits(value)) ^ sign))
    return turned


@compiled
def _vote(
    deltas: Floats,
    first: int,
    present: int,
    size: int,
    limits: Words,
    rescales: Floats,
    before: Floats,
    after: Floats,
    election: int,
    work: Floats,
    counts: Words,
) -> None:
    """The votes of up to four sources: values into ``MASS``, or signs into ``TALLY`` (+ low, - in the high 16 bits).

    A source that is missing reads the first one's values and keeps none.
    """
    words = work.view(np.int32)
    bits = deltas.view(np.int32)
    p0 = np.uint64(first * TILE)
    p1 = np.uint64((first + (1 if present > 1 else 0)) * TILE)
    p2 = np.uint64((first + (2 if present > 2 else 0)) * TILE)
    p3 = np.uint64((first + (3 if present > 3 else 0)) * TILE)
    t0, t1, t2, t3 = limits[first], limits[first + 1], limits[first + 2], limits[first + 3]
    r0, r1, r2, r3 = rescales[first], rescales[first + 1], rescales[first + 2], rescales[first + 3]
    b0, b1, b2, b3 = before[first], before[first + 1], before[first + 2], before[first + 3]
    a0, a1, a2, a3 = after[first], after[first + 1], after[first + 2], after[first + 3]
    c0 = c1 = c2 = c3 = np.int32(0)
    fresh = first == 0
    if election <= MASS:  # without an election the marks alone are of use
        for j in range(np.uint64(size)):
            s0 = (bits[p0 + j] & MAGNITUDE) > t0
            s1 = (bits[p1 + j] & MAGNITUDE) > t1
            s2 = (bits[p2 + j] & MAGNITUDE) > t2
            s3 = (bits[p3 + j] & MAGNITUDE) > t3
            k0, k1 = deltas[p0 + j] * r0 if s0 else ZERO, deltas[p1 + j] * r1 if s1 else ZERO
            k2, k3 = deltas[p2 + j] * r2 if s2 else ZERO, deltas[p3 + j] * r3 if s3 else ZERO
            c0, c1 = np.int32(c0 + np.int32(s0)), np.int32(c1 + np.int32(s1))
            c2, c3 = np.int32(c2 + np.int32(s2)), np.int32(c3 + np.int32(s3))
            v0, v1, v2, v3 = b0 * k0, b1 * k1, b2 * k2, b3 * k3
            mass = ZERO if fresh else work[j + MASS_AT]
            work[j + MASS_AT] = (((mass + v0) + v1) + v2) + v3
            w0, w1, w2, w3 = a0 * v0, a1 * v1, a2 * v2, a3 * v3
            high, low = (ZERO, ZERO) if fresh else (work[j + HIGH_AT], work[j + LOW_AT])
            work[j + HIGH_AT] = _larger(w0, _larger(w1, _larger(w2, _larger(w3, high))))
            work[j + LOW_AT] = _smaller(w0, _smaller(w1, _smaller(w2, _smaller(w3, low))))
            marks = np.int32(0) if fresh else words[j + MARKS_AT]
            words[j + MARKS_AT] = marks | _bits(k0) | _bits(k1) | _bits(k2) | _bits(k3)
    else:
        for j in range(np.uint64(size)):
            s0 = (bits[p0 + j] & MAGNITUDE) > t0
            s1 = (bits[p1 + j] & MAGNITUDE) > t1
            s2 = (bits[p2 + j] & MAGNITUDE) > t2
            s3 = (bits[p3 + j] & MAGNITUDE) > t3
            k0, k1 = deltas[p0 + j] * r0 if s0 else ZERO, deltas[p1 + j] * r1 if s1 else ZERO
            k2, k3 = deltas[p2 + j] * r2 if s2 else ZERO, deltas[p3 + j] * r3 if s3 else ZERO
            c0, c1 = np.int32(c0 + np.int32(s0)), np.int32(c1 + np.int32(s1))
            c2, c3 = np.int32(c2 + np.int32(s2)), np.int32(c3 + np.int32(s3))
            v0, v1, v2, v3 = b0 * k0, b1 * k1, b2 * k2, b3 * k3
            tally = np.int32(0) if fresh else words[j + TALLY_AT]
            words[j + TALLY_AT] = tally + _sign(v0) + _sign(v1) + _sign(v2) + _sign(v3)
            w0, w1, w2, w3 = a0 * v0, a1 * v1, a2 * v2, a3 * v3
            high, low = (ZERO, ZERO) if fresh else (work[j + HIGH_AT], work[j + LOW_AT])
            work[j + HIGH_AT] = _larger(w0, _larger(w1, _larger(w2, _larger(w3, high))))
            work[j + LOW_AT] = _smaller(w0, _smaller(w1, _smaller(w2, _smaller(w3, low))))
            marks = np.int32(0) if fresh else words[j + MARKS_AT]
            words[j + MARKS_AT] = marks | _bits(k0) | _bits(k1) | _bits(k2) | _bits(k3)
    counts[0], counts[1], counts[2], counts[3] = c0, c1, c2, c3


@_inlined
def _sign(vote: np.float32) -> np.int32:
    return np.int32((np.int32(1) if vote > ZERO else np.int32(0)) + (np.int32(65536) if vote < ZERO else np.int32(0)))


@_inlined
def _larger(x: np.float32, y: np.float32) -> np.float32:
    return x if x > y else y


@_inlined
def _smaller(x: np.float32, y: np.float32) -> np.float32:
    return x if x < y else y


@compiled
def _elect(election: int, sources: int, required: int, even: np.float32, size: int, work: Floats) -> None:
    """The elected sign of each parameter of a tile: +1, -1, or 0; ``even`` where neither outweighs the other."""
    words = work.view(np.int32)
    if election == MASS:
        for j in range(np.uint64(size)):
            mass = work[j + MASS_AT]
            work[j + ELECTED_AT] = ONE if mass > ZERO else (-ONE if mass < ZERO else even)
        return
    least = np.int32(0)
    most = np.int32(1 << 16)
    if election == UNANIMOUS:
        least = most = np.int32(sources)
    elif election == QUORUM:
        least = np.int32(required)
    for j in range(np.uint64(size)):
        positive = words[j + TALLY_AT] & np.int32(0xFFFF)
        negative = words[j + TALLY_AT] >> np.int32(16)
        sign = ONE if positive > negative else (-ONE if positive < negative else even)
        holding = positive if sign > ZERO else negative
        work[j + ELECTED_AT] = sign if (least <= holding) & (holding <= most) else ZERO


@compiled
def _sum(
    deltas: Floats,
    first: int,
    present: int,
    size: int,
    limits: Words,
    rescales: Floats,
    before: Floats,
    after: Floats,
    divisor: np.float32,
    shares: Floats,
    election: int,
    work: Floats,
) -> None:
    """The sum of what agrees, of up to four sources, and what they add to the divisor. They are trimmed once more:
    that takes less time than keeping what was trimmed."""
    bits = deltas.view(np.int32)
    p0 = np.uint64(first * TILE)
    p1 = np.uint64((first + (1 if present > 1 else 0)) * TILE)
    p2 = np.uint64((first + (2 if present > 2 else 0)) * TILE)
    p3 = np.uint64((first + (3 if present > 3 else 0)) * TILE)
    t0, t1, t2, t3 = limits[first], limits[first + 1], limits[first + 2], limits[first + 3]
    r0, r1, r2, r3 = rescales[first], rescales[first + 1], rescales[first + 2], rescales[first + 3]
    b0, b1, b2, b3 = before[first], before[first + 1], before[first + 2], before[first + 3]
    a0, a1, a2, a3 = after[first], after[first + 1], after[first + 2], after[first + 3]
    h0, h1, h2, h3 = shares[first], shares[first + 1], shares[first + 2], shares[first + 3]
    fresh = first == 0
    if election == NONE:
        for j in range(np.uint64(size)):
            v0 = b0 * (deltas[p0 + j] * r0 if (bits[p0 + j] & MAGNITUDE) > t0 else ZERO)
            v1 = b1 * (deltas[p1 + j] * r1 if (bits[p1 + j] & MAGNITUDE) > t1 else ZERO)
            v2 = b2 * (deltas[p2 + j] * r2 if (bits[p2 + j] & MAGNITUDE) > t2 else ZERO)
            v3 = b3 * (deltas[p3 + j] * r3 if (bits[p3 + j] & MAGNITUDE) > t3 else ZERO)
            total = ZERO if fresh else work[j + TOTAL_AT]
            work[j + TOTAL_AT] = (((total + a0 * v0) + a1 * v1) + a2 * v2) + a3 * v3
            shared = divisor if fresh else work[j + DIVISORS_AT]
            shared += h0 if v0 != ZERO else ZERO
            shared += h1 if v1 != ZERO else ZERO
            shared += h2 if v2 != ZERO else ZERO
            shared += h3 if v3 != ZERO else ZERO
            work[j + DIVISORS_AT] = shared
    else:
        for j in range(np.uint64(size)):
            v0 = b0 * (deltas[p0 + j] * r0 if (bits[p0 + j] & MAGNITUDE) > t0 else ZERO)
            v1 = b1 * (deltas[p1 + j] * r1 if (bits[p1 + j] & MAGNITUDE) > t1 else ZERO)
            v2 = b2 * (deltas[p2 + j] * r2 if (bits[p2 + j] & MAGNITUDE) > t2 else ZERO)
            v3 = b3 * (deltas[p3 + j] * r3 if (bits[p3 + j] & MAGNITUDE) > t3 else ZERO)
            elected = work[j + ELECTED_AT]
            g0, g1, g2, g3 = v0 * elected > ZERO, v1 * elected > ZERO, v2 * elected > ZERO, v3 * elected > ZERO
            total = ZERO if fresh else work[j + TOTAL_AT]
            total += a0 * v0 if g0 else ZERO
            total += a1 * v1 if g1 else ZERO
            total += a2 * v2 if g2 else ZERO
            total += a3 * v3 if g3 else ZERO
            work[j + TOTAL_AT] = total
            shared = divisor if fresh else work[j + DIVISORS_AT]
            shared += h0 if g0 else ZERO
            shared += h1 if g1 else ZERO
            shared += h2 if g2 else ZERO
            shared += h3 if g3 else ZERO
            work[j + DIVISORS_AT] = shared


@compiled
def _finish(
    base_factor: np.float32, scale: np.float32, smallest: np.float32, overflow: np.float32, size: int, work: Floats
) -> tuple[int, int, int]:
    """Divide, scale, add the base. How many parameters are active, how many in conflict, and how many results are
    not finite after the cast."""
    words = work.view(np.int32)
    active = conflicts = overflows = np.int32(0)
    for j in range(np.uint64(size)):
        divisor = work[j + DIVISORS_AT]
        divisor = ONE if abs(divisor) < smallest else divisor
        origin = work[j + ORIGIN_AT]
        value = base_factor * origin + scale * (work[j + TOTAL_AT] / divisor)
        work[j + RESULT_AT] = value
        work[j + CHANGE_AT] = value - origin
        active = np.int32(active + np.int32((words[j + MARKS_AT] & MAGNITUDE) != 0))
        conflicts = np.int32(conflicts + np.int32((work[j + HIGH_AT] > ZERO) & (work[j + LOW_AT] < ZERO)))
        overflows = np.int32(overflows + (np.int32(0) if abs(value) < overflow else np.int32(1)))
    return int(active), int(conflicts), int(overflows)


@compiled
def _widen(base: Floats, halves: Halves, flat: int, at: int, width: int, work: Floats) -> None:
    place, first = np.uint64(at) + ORIGIN_AT, np.uint64(flat)
    if len(halves):
        words = work.view(np.uint32)
        for j in range(np.uint64(width)):
            words[place + j] = np.uint32(halves[first + j]) << np.uint32(16)
    else:
        for j in range(np.uint64(width)):  # a slice assigned to a slice would take four times as long to compile
            work[place + j] = base[first + j]


@compiled
def _narrow(work: Floats, at: int, flat: int, width: int, out: Floats, halves: Halves) -> None:
    """Cast to bfloat16, to nearest even; a carry makes infinity by itself, and a NaN stays a (quiet) NaN."""
    place, first = np.uint64(at) + RESULT_AT, np.uint64(flat)
    if len(halves):
        words = work.view(np.uint32)
        for j in range(np.uint64(width)):
            value = words[place + j]
            odd = (value >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(np.uint32(value + np.uint32(0x7FFF)) + odd) >> np.uint32(16)
            nan = (value & np.uint32(0x7FFF_FFFF)) > np.uint32(0x7F80_0000)
            halves[first + j] = np.uint16((value >> np.uint32(16)) | np.uint32(0x40) if nan else rounded)
    else:
        for j in range(np.uint64(width)):
            out[first + j] = work[place + j]
