"""What every room of kernels must do as the reference does: cases to try, and the comparison of one room with it."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st

from tests.engine.one_tensor import trims_of
from worker.engine.kernels import Kernels, load
from worker.engine.kernels.reference import magnitudes
from worker.engine.kernels.signature import (
    COARSE_BINS,
    FINE_BINS,
    KEEP_ALL,
    BlockStatistics,
    Delta,
    Difference,
    Divisor,
    Elect,
    Product,
    Rule,
    Trim,
)

REFERENCE = load("reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The tile of the cpu room is 2048 values, those of the cuda room 2048 and 4096: sizes below, at and above them.
SIZES = st.one_of(st.integers(1, 40), st.integers(1000, 1050), st.integers(2040, 3100), st.sampled_from([4096, 4100]))
DENSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.2, 1.0]))
WEIGHTS = st.one_of(st.sampled_from([1.0, -1.0, 0.0, 0.5, 1e-9]), st.floats(-4, 4, width=32))


@dataclass(frozen=True, kw_only=True)
class Case:
    base: torch.Tensor
    deltas: torch.Tensor
    counts: list[int]  # k of each source
    weights: list[float]
    rule: Rule
    out_dtype: torch.dtype
    block: int
    rescales: list[float]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, sources = draw(SIZES), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-41, 1e-37, 1e30]))
    deltas = random.standard_normal((sources, n)) * scale
    if draw(st.booleans()):  # equal magnitudes, of both signs
        deltas = np.round(deltas / scale) * scale
    if draw(st.booleans()):  # so far apart that the order of a float64 sum shows
        deltas *= np.exp2(random.integers(-60, 1, (sources, n)))
    if draw(st.booleans()):
        deltas[random.random((sources, n)) < 0.4] = 0.0
    if draw(st.booleans()):
        deltas[random.random((sources, n)) < 0.1] *= -0.0
    return Case(
        base=torch.from_numpy(random.standard_normal(n)).to(draw(st.sampled_from(DTYPES))),
        deltas=torch.from_numpy(deltas).float(),
        counts=[int(draw(DENSITIES) * n) for _ in range(sources)],
        weights=[draw(WEIGHTS) for _ in range(sources)],
        rule=Rule(
            base=draw(st.sampled_from([1.0, 0.0, 0.7])),
            scale=draw(st.sampled_from([1.0, 0.3, -2.0])),
            elect=draw(st.sampled_from(typing.get_args(Elect))),
            weigh_votes=draw(st.booleans()),
            divisor=draw(st.sampled_from(typing.get_args(Divisor))),
            zero_sign=draw(st.sampled_from([1, -1])),
            required=draw(st.integers(0, sources)),
            sources=draw(st.integers(sources, sources + 1)),
        ),
        out_dtype=draw(st.sampled_from(DTYPES)),
        block=draw(st.sampled_from([n, max(1, n // 3), max(1, n // 2 + 1)])),
        rescales=[draw(st.sampled_from([1.0, 1.7])) for _ in range(sources)],
    )


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, list[Delta]]:
    """A base, and δ of every kind over it."""
    rows, columns = draw(
        st.sampled_from([(1, 1), (3, 5), (7, 150), (2, 1024), (5, 431), (1, 2500), (130, 9), (8, 512)])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def product() -> Product:
        rank = draw(st.integers(1, 35))
        left, right = normal(rows, rank), normal(rank, columns)
        if draw(st.booleans()):  # rows of a larger left and columns of a larger right, as blocks have them
            left, right = normal(rows + 3, rank + 2)[1 : rows + 1, :rank], normal(rank, columns + 3)[:, 2 : columns + 2]
        return Product(left, right, draw(st.sampled_from([1.0, 0.37, -2.0, 0.0])))

    base = normal(rows * columns).to(draw(st.sampled_from(DTYPES)))

    def difference() -> Difference:
        own = base.float() + normal(rows * columns) * draw(st.sampled_from([0.01, 1.0]))
        apart = draw(st.booleans())
        return Difference(own.to(draw(st.sampled_from(DTYPES))), base.clone() if apart else base, draw(WEIGHTS))

    def dense() -> torch.Tensor:
        return normal(rows * columns)

    kinds = draw(st.lists(st.sampled_from([product, difference, dense]), min_size=1, max_size=7))
    return base, [kind() for kind in kinds]


def assert_agrees(room: Kernels, case: Case) -> None:
    """Trims, survivors, balances, merged values and statistics, bit for bit."""
    blocks = [slice(at, at + case.block) for at in range(0, len(case.base), case.block)]
    for at, reference_trims, trims in zip(blocks, _trims(REFERENCE, case), _trims(room, case), strict=True):
        assert trims == reference_trims
        deltas = list(case.deltas[:, at])
        for delta, trim in zip(deltas, trims, strict=True):
            assert _like(room.kept_l1(delta, trim), REFERENCE.kept_l1(delta, trim))
            assert _bits(_survivors(room, delta, trim)) == _bits(_survivors(REFERENCE, delta, trim))
        balances = [own.elected_balance(deltas, trims, case.weights, case.rule) for own in (REFERENCE, room)]
        assert balances[0] == balances[1]

        expected, expected_statistics = _merged(REFERENCE, case, at, trims)
        merged, statistics = _merged(room, case, at, trims)
        # Stricter than one unit in the last place: the rooms do the same float32 operations in the same order.
        assert _bits(merged) == _bits(expected)
        _assert_alike(statistics, expected_statistics)


def assert_takes_every_kind(room: Kernels, made: tuple[torch.Tensor, list[Delta]], rule: Rule) -> None:
    """Every kernel on operands as on their δ."""
    base, deltas = made
    formed = [torch.empty(len(base)) for _ in deltas]
    for delta, values in zip(deltas, formed, strict=True):
        room.form(delta, values)
        expected = torch.empty_like(values)
        REFERENCE.form(delta, expected)
        assert _bits(values) == _bits(expected)

    trims = []
    for delta, values in zip(deltas, formed, strict=True):
        middle = int(magnitudes(values).sort().values[len(values) // 2])
        trim = Trim(threshold=middle, equals=REFERENCE.count_equal(delta, middle) // 2)
        trims.append(trim)
        assert room.count_equal(delta, middle) == REFERENCE.count_equal(values, middle)
        assert _like(room.kept_l1(delta, trim), REFERENCE.kept_l1(values, trim))
        for size, prefix in ((COARSE_BINS, None), (FINE_BINS, middle >> 16)):
            counts = [torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)]
            room.histogram(delta, counts[0], prefix)
            REFERENCE.histogram(values, counts[1], prefix)
            assert torch.equal(*counts)

    brackets = [(trim.threshold - (trim.threshold >> 6), trim.threshold + 1000) for trim in trims]
    found = [torch.zeros(len(deltas), len(base), dtype=torch.int32) for _ in range(2)]
    counted = room.collect(deltas, brackets, found[0])
    assert counted == REFERENCE.collect(formed, brackets, found[1])
    for (_, inside), *rows in zip(counted, *found, strict=True):
        assert torch.equal(*(row[:inside].sort().values for row in rows))

    weights = [0.5 + 0.25 * index for index in range(len(deltas))]
    assert room.elected_balance(deltas, trims, weights, rule) == REFERENCE.elected_balance(formed, trims, weights, rule)
    outs = torch.empty_like(base), torch.empty_like(base)
    statistics = room.merge(base, deltas, trims, weights, rule, outs[0])
    _assert_alike(statistics, REFERENCE.merge(base, formed, trims, weights, rule, outs[1]))
    assert _bits(outs[0]) == _bits(outs[1])


def assert_keeps_exactly_the_k_largest(room: Kernels, case: Case) -> None:
    """Against a stable sort, which puts the lowest flat index first among equals."""
    by_block = _trims(room, case)
    for source, k in enumerate(case.counts):
        delta = case.deltas[source]
        expected = torch.zeros_like(delta)
        largest = np.argsort(-delta.abs().numpy(), kind="stable")[:k]
        expected[largest] = delta[largest]
        kept, count = torch.empty_like(delta), 0
        for at, trims in zip(range(0, len(delta), case.block), by_block, strict=True):
            block = slice(at, at + case.block)
            trim = Trim(threshold=trims[source].threshold, equals=trims[source].equals)
            statistics = keep(room, delta[block], trim, kept[block])
            count += statistics.kept[0]
        assert count == k
        assert torch.equal(kept, expected)


def assert_counts_alike(room: Kernels, seed: int, n: int, threshold: int, prefix: int) -> None:
    """Over all bit patterns, so denormals, infinities and NaNs too."""
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, n, dtype=np.int64).astype(np.int32)
    bits[: n // 3] = threshold  # equal in a row
    bits[n // 2 :: 3] = (prefix << 16) | (bits[n // 2 :: 3] & 0xFFFF)
    delta = torch.from_numpy(bits).view(torch.float32)
    for size, wanted in ((1 << 15, None), (1 << 16, prefix)):
        counts = [torch.full((size,), 7), torch.full((size,), 7)]
        REFERENCE.histogram(delta, counts[0], wanted)
        room.histogram(delta, counts[1], wanted)
        assert torch.equal(counts[0], counts[1])
    assert room.count_equal(delta, threshold) == REFERENCE.count_equal(delta, threshold)
    for low, high in ((prefix << 16, threshold), (threshold, threshold), (0, 2**31 - 1)):
        for width in (n, n // 3):
            found = [torch.zeros(1, width, dtype=torch.int32), torch.zeros(1, width, dtype=torch.int32)]
            ((above, inside),) = REFERENCE.collect([delta], [(low, high)], found[0])
            assert room.collect([delta], [(low, high)], found[1]) == [(above, inside)]
            if inside <= width:
                assert torch.equal(*(own[0, :inside].sort().values for own in found))


def assert_casts_as_torch(room: Kernels, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, 4096, dtype=np.int64).astype(np.int32)
    bits[:512] = (bits[:512] & ~0xFFFF) | 0x8000  # halfway between two bfloat16
    value = torch.from_numpy(bits).view(torch.float32)
    for dtype in DTYPES:
        out = torch.empty(len(value), dtype=dtype)
        room.merge(value, [torch.zeros(len(value))], [KEEP_ALL], [1.0], Rule(), out)
        expected = (value + 0.0).to(dtype)  # δ = 0: what is cast is the base, and -0 + 0 is +0
        assert torch.equal(out.isnan(), expected.isnan())
        assert _bits(out.nan_to_num()) == _bits(expected.nan_to_num())


def _trims(kernels: Kernels, case: Case) -> list[list[Trim]]:
    """For each block, the trim of each source."""
    blocks = [slice(at, at + case.block) for at in range(0, len(case.base), case.block)]
    by_source = [
        [
            Trim(threshold=trim.threshold, equals=trim.equals, rescale=rescale)
            for trim in trims_of(kernels, delta, k, blocks)
        ]
        for delta, k, rescale in zip(case.deltas, case.counts, case.rescales, strict=True)
    ]
    return [list(of_block) for of_block in zip(*by_source, strict=True)]


def _merged(kernels: Kernels, case: Case, at: slice, trims: Sequence[Trim]) -> tuple[torch.Tensor, BlockStatistics]:
    base = case.base[at]
    out = torch.full_like(base, 7.0, dtype=case.out_dtype)
    return out, kernels.merge(base, list(case.deltas[:, at]), trims, case.weights, case.rule, out)


def _survivors(kernels: Kernels, delta: torch.Tensor, trim: Trim) -> torch.Tensor:
    out = torch.empty_like(delta)
    keep(kernels, delta, trim, out)
    return out


def keep(kernels: Kernels, delta: torch.Tensor, trim: Trim, out: torch.Tensor) -> BlockStatistics:
    """Only the trim: the base is zero and one source is merged as it is."""
    return kernels.merge(torch.zeros_like(delta), [delta], [trim], [1.0], Rule(), out)


def _like(left: float, right: float) -> bool:
    """A float sum of two rooms, each in its own order."""
    return math.isclose(left, right, rel_tol=1e-6)


def _assert_alike(left: BlockStatistics, right: BlockStatistics) -> None:
    assert replace(left, squares=(), merged_square=0.0) == replace(right, squares=(), merged_square=0.0)
    assert all(map(_like, left.squares, right.squares))
    assert _like(left.merged_square, right.merged_square)


def _bits(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()
