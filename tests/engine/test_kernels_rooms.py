"""Every room against the reference: the same values kept, the same signs elected, the same results and counts."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite.binding import get_host_cpu_features
from numba.core import caching
from numba.core.dispatcher import Dispatcher

from app.errors import MergeyardError
from tests.engine import room_cases
from tests.engine.one_tensor import trims_of
from tests.engine.room_cases import REFERENCE, SIZES, Case, cases, keep, operands
from tests.engine.rooms import room
from worker.engine.kernels import Kernels, cpu_loops, load, warm_up
from worker.engine.kernels.cpu_loops import compiled
from worker.engine.kernels.signature import KEEP_ALL, Delta, Product, Rule, Trim

CPU, CUDA = room("cpu"), room("cuda")
ROOMS = pytest.mark.parametrize("kernels", [REFERENCE, CPU, CUDA], ids=["reference", "cpu", "cuda"])
SEEDS = st.integers(0, 2**32 - 1)
RULES = st.sampled_from([Rule(elect="mass", divisor="agreeing"), Rule(elect="quorum", required=2)])
THRESHOLDS, PREFIXES = st.integers(0, 2**31 - 1), st.integers(0, 2**15 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """Thousands of tiny operations, each of which would wait for threads that have nothing to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestTheCpuRoom:
    @given(case=cases())
    @settings(max_examples=200, deadline=None)
    def test_agrees_with_the_reference_bit_for_bit(self, case: Case) -> None:
        room_cases.assert_agrees(CPU, case)

    @given(made=operands(), rule=RULES)
    @settings(max_examples=150, deadline=None)
    def test_takes_every_kind_of_delta(self, made: tuple[torch.Tensor, list[Delta]], rule: Rule) -> None:
        room_cases.assert_takes_every_kind(CPU, made, rule)

    @given(case=cases())
    @settings(max_examples=60, deadline=None)
    def test_keeps_exactly_the_k_largest(self, case: Case) -> None:
        room_cases.assert_keeps_exactly_the_k_largest(CPU, case)

    @given(seed=SEEDS, n=SIZES, threshold=THRESHOLDS, prefix=PREFIXES)
    @settings(max_examples=60, deadline=None)
    def test_counts_all_bit_patterns(self, seed: int, n: int, threshold: int, prefix: int) -> None:
        room_cases.assert_counts_alike(CPU, seed, n, threshold, prefix)

    @given(seed=SEEDS)
    @settings(max_examples=20, deadline=None)
    def test_casts_every_float_as_torch_does(self, seed: int) -> None:
        room_cases.assert_casts_as_torch(CPU, seed)


class TestTheCudaRoom:
    """Few examples: without a GPU Triton's interpreter takes half a second for each."""

    @given(case=cases())
    @settings(max_examples=12, deadline=None)
    def test_agrees_with_the_reference_bit_for_bit(self, case: Case) -> None:
        room_cases.assert_agrees(CUDA, case)

    @given(made=operands(), rule=RULES)
    @settings(max_examples=8, deadline=None)
    def test_takes_every_kind_of_delta(self, made: tuple[torch.Tensor, list[Delta]], rule: Rule) -> None:
        room_cases.assert_takes_every_kind(CUDA, made, rule)

    @given(case=cases())
    @settings(max_examples=5, deadline=None)
    def test_keeps_exactly_the_k_largest(self, case: Case) -> None:
        room_cases.assert_keeps_exactly_the_k_largest(CUDA, case)

    @given(seed=SEEDS, n=SIZES, threshold=THRESHOLDS, prefix=PREFIXES)
    @settings(max_examples=10, deadline=None)
    def test_counts_all_bit_patterns(self, seed: int, n: int, threshold: int, prefix: int) -> None:
        room_cases.assert_counts_alike(CUDA, seed, n, threshold, prefix)

    @given(seed=SEEDS)
    @settings(max_examples=5, deadline=None)
    def test_casts_every_float_as_torch_does(self, seed: int) -> None:
        room_cases.assert_casts_as_torch(CUDA, seed)


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_the_reference_keeps_exactly_the_k_largest(case: Case) -> None:
    room_cases.assert_keeps_exactly_the_k_largest(REFERENCE, case)


@ROOMS
def test_products_of_unlike_shapes_are_merged_together(kernels: Kernels) -> None:
    """One adapter may see as a matrix what another sees as a row of it."""
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 10.0]])
    flat = torch.tensor([[3.0]]), torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    deltas = [Product(kernels.place(left), kernels.place(right), 1.0), Product(*map(kernels.place, flat), 1.0)]
    out = torch.empty(4)
    kernels.merge(torch.zeros(4), deltas, [KEEP_ALL] * 2, [1.0, 1.0], Rule(), out)
    assert out.tolist() == [4.0, 13.0, 8.0, 26.0]


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
    keep(kernels, delta, trim, out)
    assert out.tolist() == [0.0, -3 * smallest, 0.0]


@ROOMS
def test_more_equals_than_there_are_keeps_them_all(kernels: Kernels) -> None:
    delta, out = torch.tensor([1.0, -1.0, 0.5, 2.0, 1.0]), torch.empty(5)
    statistics = keep(kernels, delta, Trim(threshold=0x3F800000, equals=9), out)
    assert out.tolist() == [1.0, -1.0, 0.0, 2.0, 1.0]
    assert statistics.kept == (4,)


@ROOMS
def test_warm_up_runs(kernels: Kernels) -> None:
    warm_up(kernels)


def test_nothing_is_left_to_compile_after_the_warm_up() -> None:
    warm_up(CPU)
    own = [value for value in vars(cpu_loops).values() if isinstance(value, Dispatcher)]
    entries = [loop for loop in own if not loop.__name__.startswith("_")]
    assert len(entries) > 8
    assert [loop.__name__ for loop in entries if len(loop.signatures) != 1] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for instructions of x86-64")
def test_the_loops_run_in_vector_registers_and_fuse_nothing() -> None:
    warm_up(CPU)
    loop = cpu_loops.collect
    # code that comes from the cache cannot be looked at
    compiled_here = numba.njit(nogil=True, error_model="numpy")(loop.py_func)  # type: ignore[attr-defined]
    compiled_here.compile(loop.signatures[0])  # type: ignore[attr-defined]
    (text,) = compiled_here.inspect_asm().values()
    wide = get_host_cpu_features()["avx512f"]
    for instruction in ("vmulps", "vaddps"):  # of a product
        assert re.search(rf"{instruction}\s.*%{'zmm' if wide else 'ymm'}", text)
    assert not wide or re.search(r"vpcompressd\s+%zmm", text)
    assert "vfmadd" not in text


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda_build: bool, gpu: bool, triton: bool = True) -> None:
    """Have torch and Python say what they would say on such a machine."""
    monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("worker.engine.kernels.find_spec", lambda name: name if triton else None)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda_build=True, gpu=True)
    assert load("auto").name == load("cuda").name == "cuda"
    machine(monkeypatch, cuda_build=True, gpu=False)
    assert load("auto").name == "cpu"


@pytest.mark.parametrize(
    ("has", "advice"),
    [
        ({"cuda_build": False, "gpu": False}, "TORCH_INDEX"),
        ({"cuda_build": True, "gpu": False}, "nvidia-smi"),
        ({"cuda_build": True, "gpu": True, "triton": False}, "needs triton"),
    ],
    ids=["torch for the CPU", "no GPU", "no triton"],
)
def test_cuda_is_refused_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], advice: str
) -> None:
    machine(monkeypatch, **has)
    with pytest.raises(MergeyardError, match=advice) as refused:
        load("cuda")
    assert refused.value.code == "not_supported"


def test_an_install_without_a_writable_cache_folder_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def twice(value: int) -> int:
        return 2 * value

    assert compiled(twice)(21) == 42
