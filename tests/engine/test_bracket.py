"""The bracket around a threshold: it holds what it should, and where it misses, no byte of the result is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.merges import bytes_of, merge, plan_of
from tests.files import write_adapter, write_model
from worker.engine import bracket as bracketing
from worker.engine import trimming
from worker.engine.bracket import SMALL, Bracket, Collected, Sample, bracket, kth_largest
from worker.engine.kernels import load

SHAPE = (700, 1037)
MISSES: dict[str, Bracket | None] = {
    "below": (0, 1),
    "above": (0x7F7F_0000, 0x7FFF_FFFF),
    "nowhere": None,
    "everything": (0, 0x7FFF_FFFF),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three kinds of δ: one plain product, a fine-tune full of equal magnitudes, and both together."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    names = ("m.k_proj.weight", "m.q_proj.weight")
    base = {name: torch.randn(SHAPE, generator=generator).bfloat16() for name in names}
    write_model(folder / "base", base)
    steps = {name: value + torch.randn(SHAPE, generator=generator).mul(0.02) for name, value in base.items()}
    write_model(folder / "tuned", {name: value.bfloat16() for name, value in steps.items()})
    factors = {}
    for name in names:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{key}.lora_A.weight"] = torch.randn(5, SHAPE[1], generator=generator)
        factors[f"{key}.lora_B.weight"] = torch.randn(SHAPE[0], 5, generator=generator)
    write_adapter(folder / "sql", factors, r=5, target_modules=["k_proj", "q_proj"])
    return folder


def recipe(scope: str) -> dict[str, Any]:
    return {
        "base_model": "base",
        "merge_method": "ties",
        "models": [{"adapter": "sql"}, {"model": "tuned"}, {"model": "tuned+sql"}],
        "parameters": {"density": 0.3, "trim_scope": scope},
    }


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("miss", MISSES)
def test_a_bracket_that_misses_changes_no_byte(
    scope: str, miss: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(root, recipe(scope))
    merge(plan, tmp_path / "expected")
    monkeypatch.setattr(trimming, "bracket", lambda *_: MISSES[miss])
    merge(plan, tmp_path / "missed")
    assert bytes_of(tmp_path / "missed") == bytes_of(tmp_path / "expected")


def test_more_inside_than_is_kept_changes_no_byte(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(root, recipe("tensor"))
    merge(plan, tmp_path / "expected")
    monkeypatch.setattr(bracketing, "COLLECTED_BYTES", 4000)
    merge(plan, tmp_path / "few")
    assert bytes_of(tmp_path / "few") == bytes_of(tmp_path / "expected")


def test_the_histograms_are_not_needed_for_a_product(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a second sweep")

    monkeypatch.setattr(trimming.Passes, "_histograms", refuse)
    merge(plan_of(root, recipe("tensor") | {"models": [{"adapter": "sql"}]}), tmp_path / "out")


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 0.999))
@settings(max_examples=30, deadline=None)
def test_the_bracket_is_narrow_and_holds_the_threshold(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    sizes = (1 << 20, 1 << 18)
    tensors = [
        random.standard_normal(size, dtype=np.float32) * scale for size, scale in zip(sizes, (1, 3), strict=True)
    ]
    samples = [Sample(torch.from_numpy(random.choice(values, 1 << 15)).view(32, -1), len(values)) for values in tensors]
    bits = np.sort(np.abs(np.concatenate(tensors))).view(np.int32)
    k = int(share * len(bits))
    found = bracket(samples, k, len(bits))
    assert found is not None
    low, high = found
    assert low <= bits[len(bits) - k] <= high
    assert ((bits >= low) & (bits <= high)).mean() < 0.1


@given(
    seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), period=st.sampled_from([1, 64]), levels=st.integers(1, 22)
)
@settings(max_examples=40, deadline=None)
def test_the_kth_of_many_is_exact_whatever_their_order(seed: int, share: float, period: int, levels: int) -> None:
    """With a period of 64 the values looked at first are all the largest, and say nothing of the others."""
    size = 3 * SMALL + 17
    values = np.random.default_rng(seed).integers(0, 1 << levels, size, dtype=np.int32)
    if period > 1:
        ordered = np.sort(values)[::-1]
        chosen = np.arange(size) % period == 0
        values[chosen], values[~chosen] = ordered[: chosen.sum()], ordered[chosen.sum() :]
    k = max(1, int(share * size))
    assert kth_largest(values, k) == np.sort(values)[-k]


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3000), levels=st.sampled_from([3, 50, 10**6]))
@settings(max_examples=40, deadline=None)
def test_what_is_collected_is_what_a_stable_sort_keeps(seed: int, k: int, levels: int) -> None:
    kernels = load("cpu")
    bits = np.random.default_rng(seed).integers(1, levels + 1, 3000).astype(np.int32)
    delta = torch.from_numpy(bits.view(np.float32))
    low, high = levels // 4, levels - levels // 4
    collected = Collected()
    for start in range(0, 3000, 1100):
        found = torch.empty(1, 1100, dtype=torch.int32)
        ((above, inside),) = kernels.collect([delta[start : start + 1100]], [(low, high)], found)
        collected.add("w", above, found.numpy()[0, :inside])
    kth = int(np.sort(bits)[-k])
    place = collected.largest(k)
    if not low <= kth <= high:
        assert place is None
        return
    kept = k - int((bits > kth).sum())
    assert place == (kth, kept, int((bits == kth).sum()))
    first = np.flatnonzero(bits == kth)[:kept]
    present = [int((bits[start : start + 1100] == kth).sum()) for start in range(0, 3000, 1100)]
    expected = [int(((first >= start) & (first < start + 1100)).sum()) for start in range(0, 3000, 1100)]
    shared = [min(*pair) for pair in zip(collected.shared(kth, kept)["w"], present, strict=True)]
    assert shared == expected
