"""The cpu room against the reference: the same values kept, the same signs elected, the same results and counts."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from app.errors import MergeyardError
from tests.engine.one_tensor import trims_of
from worker.engine.kernels import Kernels, load, warm_up
from worker.engine.kernels.cpu import _compiled
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
CPU = load("cpu")
ROOMS = pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The tile of the cpu room is 1024 values: sizes below, at and above one, two and three of them.
SIZES = st.one_of(st.integers(1, 40), st.integers(1000, 1050), st.integers(2040, 3100))
DENSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.2, 1.0]))
WEIGHTS = st.one_of(st.sampled_from([1.0, -1.0, 0.0, 0.5, 1e-9]), st.floats(-4, 4, width=32))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Thousands of tiny operations, each of which would wait for threads that have nothing to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_rooms_agree_bit_for_bit(case: Case) -> None:
    blocks = [slice(at, at + case.block) for at in range(0, len(case.base), case.block)]
    for at, reference_trims, cpu_trims in zip(blocks, _trims(REFERENCE, case), _trims(CPU, case), strict=True):
        assert cpu_trims == reference_trims
        deltas = list(case.deltas[:, at])
        for delta, trim in zip(deltas, cpu_trims, strict=True):
            assert _like(CPU.kept_l1(delta, trim), REFERENCE.kept_l1(delta, trim))
            assert _bits(_survivors(CPU, delta, trim)) == _bits(_survivors(REFERENCE, delta, trim))
        balances = [room.elected_balance(deltas, cpu_trims, case.weights, case.rule) for room in (REFERENCE, CPU)]
        assert balances[0] == balances[1]

        expected, expected_statistics = _merged(REFERENCE, case, at, cpu_trims)
        merged, statistics = _merged(CPU, case, at, cpu_trims)
        # Stricter than one unit in the last place: the rooms do the same float32 operations in the same order.
        assert _bits(merged) == _bits(expected)
        _assert_alike(statistics, expected_statistics)


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, list[Delta]]:
    """A base, and δ of every kind over it."""
    rows, columns = draw(st.sampled_from([(1, 1), (3, 5), (7, 150), (2, 1024), (5, 431), (1, 2500), (130, 9)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def product() -> Product:
        rank = draw(st.integers(1, 35))
        # rows of a larger left and columns of a larger right, as blocks have them
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


@given(
    made=operands(), rule=st.sampled_from([Rule(elect="mass", divisor="agreeing"), Rule(elect="quorum", required=2)])
)
@settings(max_examples=150, deadline=None)
def test_rooms_agree_on_every_kind_of_delta(made: tuple[torch.Tensor, list[Delta]], rule: Rule) -> None:
    base, deltas = made
    formed = [torch.empty(len(base)) for _ in deltas]
    for delta, values in zip(deltas, formed, strict=True):
        CPU.form(delta, values)
        expected = torch.empty_like(values)
        REFERENCE.form(delta, expected)
        assert _bits(values) == _bits(expected)

    trims = []
    for delta, values in zip(deltas, formed, strict=True):
        middle = int(magnitudes(values).sort().values[len(values) // 2])
        trim = Trim(threshold=middle, equals=REFERENCE.count_equal(delta, middle) // 2)
        trims.append(trim)
        assert CPU.count_equal(delta, middle) == REFERENCE.count_equal(values, middle)
        assert _like(CPU.kept_l1(delta, trim), REFERENCE.kept_l1(values, trim))
        for size, prefix in ((COARSE_BINS, None), (FINE_BINS, middle >> 16)):
            counts = [torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)]
            CPU.histogram(delta, counts[0], prefix)
            REFERENCE.histogram(values, counts[1], prefix)
            assert torch.equal(*counts)

    brackets = [(trim.threshold - (trim.threshold >> 6), trim.threshold + 1000) for trim in trims]
    found = [torch.zeros(len(deltas), len(base), dtype=torch.int32) for _ in range(2)]
    counted = CPU.collect(deltas, brackets, found[0])
    assert counted == REFERENCE.collect(formed, brackets, found[1])
    for (_, inside), *rows in zip(counted, *found, strict=True):
        assert torch.equal(*(row[:inside].sort().values for row in rows))

    weights = [0.5 + 0.25 * index for index in range(len(deltas))]
    assert CPU.elected_balance(deltas, trims, weights, rule) == REFERENCE.elected_balance(formed, trims, weights, rule)
    outs = torch.empty_like(base), torch.empty_like(base)
    statistics = CPU.merge(base, deltas, trims, weights, rule, outs[0])
    _assert_alike(statistics, REFERENCE.merge(base, formed, trims, weights, rule, outs[1]))
    assert _bits(outs[0]) == _bits(outs[1])


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_exactly_the_k_largest_are_kept(case: Case) -> None:
    """Against a stable sort, which puts the lowest flat index first among equals."""
    for kernels in (REFERENCE, CPU):
        by_block = _trims(kernels, case)
        for source, k in enumerate(case.counts):
            delta = case.deltas[source]
            expected = torch.zeros_like(delta)
            largest = np.argsort(-delta.abs().numpy(), kind="stable")[:k]
            expected[largest] = delta[largest]
            kept, count = torch.empty_like(delta), 0
            for at, trims in zip(range(0, len(delta), case.block), by_block, strict=True):
                block = slice(at, at + case.block)
                trim = Trim(threshold=trims[source].threshold, equals=trims[source].equals)
                statistics = _keep(kernels, delta[block], trim, kept[block])
                count += statistics.kept[0]
            assert count == k
            assert torch.equal(kept, expected)


@given(seed=st.integers(0, 2**32 - 1), n=SIZES, threshold=st.integers(0, 2**31 - 1), prefix=st.integers(0, 2**15 - 1))
@settings(max_examples=60, deadline=None)
def test_rooms_count_alike(seed: int, n: int, threshold: int, prefix: int) -> None:
    """Over all bit patterns, so denormals, infinities and NaNs too."""
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, n, dtype=np.int64).astype(np.int32)
    bits[: n // 3] = threshold  # equal in a row
    bits[n // 2 :: 3] = (prefix << 16) | (bits[n // 2 :: 3] & 0xFFFF)
    delta = torch.from_numpy(bits).view(torch.float32)
    for size, wanted in ((1 << 15, None), (1 << 16, prefix)):
        counts = [torch.full((size,), 7), torch.full((size,), 7)]
        REFERENCE.histogram(delta, counts[0], wanted)
        CPU.histogram(delta, counts[1], wanted)
        assert torch.equal(counts[0], counts[1])
    assert CPU.count_equal(delta, threshold) == REFERENCE.count_equal(delta, threshold)
    for low, high in ((prefix << 16, threshold), (threshold, threshold), (0, 2**31 - 1)):
        for room in (n, n // 3):
            found = [torch.zeros(1, room, dtype=torch.int32), torch.zeros(1, room, dtype=torch.int32)]
            ((above, inside),) = REFERENCE.collect([delta], [(low, high)], found[0])
            assert CPU.collect([delta], [(low, high)], found[1]) == [(above, inside)]
            if inside <= room:
                assert torch.equal(*(own[0, :inside].sort().values for own in found))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_every_float_is_cast_as_torch_casts_it(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, 4096, dtype=np.int64).astype(np.int32)
    bits[:512] = (bits[:512] & ~0xFFFF) | 0x8000  # halfway between two bfloat16
    value = torch.from_numpy(bits).view(torch.float32)
    for dtype in DTYPES:
        out = torch.empty(len(value), dtype=dtype)
        CPU.merge(value, [torch.zeros(len(value))], [KEEP_ALL], [1.0], Rule(), out)
        expected = (value + 0.0).to(dtype)  # δ = 0: what is cast is the base, and -0 + 0 is +0
        assert torch.equal(out.isnan(), expected.isnan())
        assert _bits(out.nan_to_num()) == _bits(expected.nan_to_num())


@ROOMS
@pytest.mark.parametrize(
    ("dtype", "least_infinite"),
    [(torch.bfloat16, (2 - 2**-8) * 2.0**127), (torch.float16, 65520.0)],
)
def test_a_result_that_rounds_to_infinity_is_not_finite(
    kernels: Kernels, dtype: torch.dtype, least_infinite: float
) -> None:
    below = float(np.nextafter(np.float32(least_infinite), np.float32(0)))
    base, out = torch.zeros(1, dtype=dtype), torch.empty(1, dtype=dtype)
    for value, finite in ((least_infinite, False), (-least_infinite, False), (below, True)):
        statistics = kernels.merge(base, [torch.tensor([value])], [KEEP_ALL], [1.0], Rule(), out)
        assert statistics.finite is finite
        assert bool(out.isfinite()) is finite


@ROOMS
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_a_damaged_source_shows_in_its_squares(kernels: Kernels, damage: float) -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, damage])]
    rule = Rule(elect="mass", divisor="agreeing")
    statistics = kernels.merge(torch.zeros(2), deltas, [KEEP_ALL] * 2, [1.0, 1.0], rule, torch.empty(2))
    assert math.isfinite(statistics.squares[0])
    assert not math.isfinite(statistics.squares[1])


@ROOMS
def test_a_damaged_base_is_not_finite(kernels: Kernels) -> None:
    base = torch.tensor([0.0, math.nan], dtype=torch.bfloat16)
    statistics = kernels.merge(base, [torch.ones(2)], [KEEP_ALL], [1.0], Rule(), torch.empty_like(base))
    assert not statistics.finite


@ROOMS
def test_denormals_are_not_flushed(kernels: Kernels) -> None:
    smallest = 2.0**-149
    delta = torch.tensor([smallest, -3 * smallest, 0.0])
    (trim,) = trims_of(kernels, delta, 1, [slice(0, 3)])
    out = torch.empty(3)
    _keep(kernels, delta, trim, out)
    assert out.tolist() == [0.0, -3 * smallest, 0.0]


@ROOMS
def test_more_equals_than_there_are_keeps_them_all(kernels: Kernels) -> None:
    delta, out = torch.tensor([1.0, -1.0, 0.5, 2.0, 1.0]), torch.empty(5)
    statistics = _keep(kernels, delta, Trim(threshold=0x3F800000, equals=9), out)
    assert out.tolist() == [1.0, -1.0, 0.0, 2.0, 1.0]
    assert statistics.kept == (4,)


@ROOMS
def test_warm_up_runs(kernels: Kernels) -> None:
    warm_up(kernels)


def test_auto_is_the_cpu() -> None:
    assert load("auto").name == "cpu"


def test_cuda_is_refused_by_name() -> None:
    with pytest.raises(MergeyardError) as refused:
        load("cuda")
    assert refused.value.code == "not_supported"


def test_an_install_without_a_writable_cache_folder_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def twice(value: int) -> int:
        return 2 * value

    assert _compiled(twice)(21) == 42


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
    _keep(kernels, delta, trim, out)
    return out


def _keep(kernels: Kernels, delta: torch.Tensor, trim: Trim, out: torch.Tensor) -> BlockStatistics:
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
