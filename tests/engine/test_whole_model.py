"""Thresholds and majorities over the whole model equal those of an oracle that concatenates everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from app.artifacts.manifest import TensorStatistics
from tests.engine.merges import Watch, merge, plan_of, tensors_of
from tests.files import write_adapter, write_model
from worker.engine import blocks
from worker.engine.kernels import Room

Vector = npt.NDArray[np.float32]

SHAPES = {"d": (7,), "a": (40, 9), "c": (11, 13), "b": (3, 50, 2)}  # not in the order of their names
SOURCES = 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor of a few hundred values is many blocks."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 32)


def write_models(root: Path, *, coarse: bool) -> dict[int, dict[str, Vector]]:
    """A base of zeros and fine-tunes; ``coarse`` values are few, so many magnitudes equal the threshold."""
    generator = torch.Generator().manual_seed(3)
    write_model(root / "base", {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    changes: dict[int, dict[str, Vector]] = {}
    for source in range(SOURCES):
        values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        if coarse:
            values = {name: (value * 2).round() / 2 for name, value in values.items()}
        write_model(root / f"x{source}", values)
        changes[source] = {name: value.numpy().reshape(-1) for name, value in values.items()}
    return changes


def recipe(density: float, dialect: str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": f"x{source}", "parameters": {"density": density}} for source in range(SOURCES)]
    return {
        "base_model": "base",
        "merge_method": "ties",
        "models": models,
        "parameters": {"dialect": dialect, **parameters},
    }


def keep_largest(values: Vector, k: int) -> Vector:
    """Exactly k values: the largest magnitudes, among equals the lowest index."""
    order = np.argsort(-np.abs(values), kind="stable")
    kept = np.zeros_like(values)
    kept[order[:k]] = values[order[:k]]
    return kept


def papers_ties(vectors: list[Vector], density: float) -> Vector:
    """Yadav et al. 2023 on whole task vectors, a step a line."""
    kept = np.stack([keep_largest(vector, int(density * len(vector))) for vector in vectors])
    elected = np.sign(kept.sum(axis=0))
    majority = np.sign(elected.sum()) or 1.0
    elected[elected == 0] = majority
    agree = (np.sign(kept) == elected) & (kept != 0)
    return np.asarray((kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1), dtype=np.float32)


def concatenated(tensors: dict[str, Any]) -> Vector:
    return np.concatenate([np.asarray(tensors[name]).reshape(-1) for name in sorted(SHAPES)])


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize("coarse", [False, True], ids=["all-different", "many-equal"])
@pytest.mark.parametrize("density", [0.0, 0.0004, 0.1, 0.5, 1.0])
def test_paper_equals_the_concatenating_oracle(room: Room, coarse: bool, density: float, tmp_path: Path) -> None:
    changes = write_models(tmp_path, coarse=coarse)
    merge(plan_of(tmp_path, recipe(density, "paper")), tmp_path / "out", room=room)
    expected = papers_ties([concatenated(changes[source]) for source in range(SOURCES)], density)
    np.testing.assert_allclose(concatenated(tensors_of(tmp_path / "out")), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_zero_sum_takes_the_models_majority_sign(sign: float, tmp_path: Path) -> None:
    """The two sources cancel in ``a``; ``b``, another tensor, decides."""
    write_model(tmp_path / "base", {"a": torch.zeros(1), "b": torch.zeros(3)})
    for source, values in enumerate(([2.0, 1.0], [-2.0, 1.0])):
        changed = {"a": torch.tensor(values[:1]), "b": torch.full((3,), sign * values[1])}
        write_model(tmp_path / f"x{source}", changed)
    models = [{"model": "x0"}, {"model": "x1"}]
    wanted = {"base_model": "base", "merge_method": "ties", "models": models, "parameters": {"dialect": "paper"}}
    merge(plan_of(tmp_path, wanted), tmp_path / "out")
    assert tensors_of(tmp_path / "out")["a"].tolist() == [sign * 2.0]


def test_a_whole_model_trim_keeps_exactly_k_of_what_a_source_touches(tmp_path: Path) -> None:
    """The adapter's task vector is the one tensor it adapts, the fine-tune's is the whole model."""
    factors = {
        "base_model.model.m.lora_A.weight": torch.ones(1, 9),
        "base_model.model.m.lora_B.weight": torch.ones(40, 1),
    }
    write_model(tmp_path / "base", {"m.weight": torch.zeros(40, 9), "rest": torch.zeros(500)})
    write_model(tmp_path / "x0", {"m.weight": torch.ones(40, 9), "rest": torch.ones(500)})
    write_adapter(tmp_path / "adapter", factors, r=1, lora_alpha=1)
    wanted = {
        "base_model": "base",
        "merge_method": "ties",
        "models": [{"model": "x0"}, {"adapter": "adapter"}],
        "parameters": {"trim_scope": "model", "density": 0.3},
    }
    manifest = merge(plan_of(tmp_path, wanted), tmp_path / "out")
    adapter, tuned = (source.reference for source in manifest.sources[1:])
    assert (adapter, tuned) == ("models:adapter", "models:x0")
    entries = manifest.statistics.values()
    assert round(sum(kept_values(entry, 1) for entry in entries)) == int(0.3 * 860)
    assert round(kept_values(manifest.statistics["m.weight"], 0)) == int(0.3 * 360)
    # all magnitudes are equal, so the lowest flat indices of the first tensor by name stay
    assert tensors_of(tmp_path / "out")["m.weight"].reshape(-1).nonzero().reshape(-1).tolist() == list(range(258))


def kept_values(entry: TensorStatistics, source: int) -> float:
    return (1 - entry.trimmed[entry.sources.index(source)]) * entry.parameters


def test_rescale_spans_what_the_trim_spans(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"a": torch.zeros(2), "b": torch.zeros(2)})
    write_model(tmp_path / "x0", {"a": torch.tensor([6.0, 2.0]), "b": torch.tensor([1.0, -1.0])})
    wanted = {
        "base_model": "base",
        "merge_method": "ties",
        "models": [{"model": "x0", "parameters": {"density": 0.5}}],
        "parameters": {"trim_scope": "model", "rescale": True},
    }
    merge(plan_of(tmp_path, wanted), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found["a"].tolist() == [7.5, 2.5]  # 10 / 8
    assert found["b"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("coarse", [False, True], ids=["all-different", "many-equal"])
def test_progress_counts_every_pass_and_ends_at_its_total(rescale: bool, coarse: bool, tmp_path: Path) -> None:
    write_models(tmp_path, coarse=coarse)
    watch = Watch()
    merge(plan_of(tmp_path, recipe(0.3, "paper", rescale=rescale)), tmp_path / "out", control=watch)
    done = [step for step, _ in watch.steps]
    assert done == sorted(done)
    assert {total for _, total in watch.steps} == {done[-1]}
    output = sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    # one pass that collects and three where that misses, the L1 norms, the majority sign, the merge itself
    assert done[-1] == output * (7 if rescale else 6)
    assert watch.stages == ["merging", "publishing"]


@pytest.mark.parametrize("dialect", ["paper", "article"])
def test_a_tensor_without_values_has_no_part_in_it(dialect: str, tmp_path: Path) -> None:
    """Of a scope that is large enough to be sampled."""
    shapes = {"a": (300, 300), "b": (0, 8), "c": (8, 0)}
    for seed, name in enumerate(("base", "x0", "x1", "x2")):
        generator = torch.Generator().manual_seed(seed)
        write_model(tmp_path / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    merge(plan_of(tmp_path, recipe(0.5, dialect)), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert {name: tuple(values.shape) for name, values in merged.items()} == shapes
    assert not torch.equal(merged["a"], tensors_of(tmp_path / "base")["a"])
