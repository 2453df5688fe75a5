"""The same recipe gives the same bytes: whatever the threads, the memory for Δ, and the folder it is merged in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipe.methods import METHODS
from tests.engine.merges import bytes_of, merge, plan_of
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model
from worker.engine import blocks

RECIPES: dict[str, dict[str, Any]] = {
    "tensor": {"dialect": "mergekit"},
    "tensor-rescaled": {"dialect": "peft", "rescale": True},
    "model": {"dialect": "paper", "rescale": True},
    "article": {"dialect": "article"},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 24)  # three rows of eight
    write_model(tmp_path / "base", llama_tensors(dtype=torch.bfloat16))
    write_model(tmp_path / "tuned", llama_tensors(seed=5, dtype=torch.bfloat16))
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2, rank=3), r=3)
    return tmp_path


def recipe(**parameters: Any) -> dict[str, Any]:
    return {
        "base_model": "base",
        "merge_method": "ties",
        "models": [
            {"adapter": "sql", "parameters": {"weight": 0.7}},
            {"model": "tuned+json"},
            {"model": "tuned", "parameters": {"weight": -0.3}},
        ],
        "parameters": {"density": 0.4, "normalize": False, **parameters},
    }


@pytest.mark.parametrize("name", RECIPES)
def test_threads_and_memory_change_no_byte(name: str, root: Path) -> None:
    plan = plan_of(root, recipe(**RECIPES[name]))
    merge(plan, root / "out", threads=1, delta_budget=1 << 20)
    expected = bytes_of(root / "out")
    for threads, budget in ((1, 0), (2, 1 << 20), (3, 0), (7, 1 << 20)):
        shutil.rmtree(root / "out")
        merge(plan, root / "out", threads=threads, delta_budget=budget)
        assert bytes_of(root / "out") == expected, (threads, budget)


def test_larger_tensors_at_odd_widths_change_no_byte(tmp_path: Path) -> None:
    """Rows of 1037 values start at every possible distance from an aligned address; blocks have their real size."""
    shape = (1100, 1037)
    generator = torch.Generator().manual_seed(0)
    write_model(tmp_path / "base", {"m.q_proj.weight": torch.randn(shape, generator=generator).bfloat16()})
    for index, rank in enumerate((5, 16, 80)):
        key = "base_model.model.m.q_proj"
        factors = {
            f"{key}.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
            f"{key}.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
        }
        write_adapter(tmp_path / f"a{index}", factors, r=rank, lora_alpha=7)
    models = [{"adapter": f"a{index}", "parameters": {"density": 0.2}} for index in range(3)]
    plan = plan_of(tmp_path, {"base_model": "base", "merge_method": "ties", "models": models})
    assert len(blocks.cut(shape)) > 2
    found: list[dict[str, bytes]] = []
    for threads, budget in ((1, 0), (4, 1 << 30), (3, 0), (1, 1 << 30)):
        merge(plan, tmp_path / f"out-{len(found)}", threads=threads, delta_budget=budget)
        found.append(bytes_of(tmp_path / f"out-{len(found)}"))
    assert all(other == found[0] for other in found)


# what a method must be told, or that puts its passes to work; models: how many sources it takes
OWN: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"rescale": True},
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.4},
    "nearswap": {"t": 0.1},
    "passthrough": {"scale": 0.7},
}


FACTORS = {"tsv", "iso_c", "knots"}  # merge adapters alone


def every_method(method: str) -> dict[str, Any]:
    spec = METHODS[method]
    models = [{"adapter": "sql"}, {"model": "tuned+json"}, {"model": "tuned"}][-(spec.most or 3) :]
    if method in FACTORS:
        models = [{"adapter": "sql"}, {"adapter": "json"}]
    parameters: dict[str, Any] = {"density": 0.4} if "density" in spec.parameters else {}
    if "weight" in spec.parameters:
        parameters["weight"] = 0.3
    return {
        "base_model": "base",
        "merge_method": method,
        "models": models,
        "parameters": {**parameters, **OWN.get(method, {})},
    }


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_memory_change_no_byte_of_any_method(method: str, root: Path) -> None:
    plan = plan_of(root, every_method(method))
    found = []
    for threads, budget in ((1, 1 << 20), (1, 0), (3, 0), (7, 1 << 20)):
        merge(plan, root / f"out-{len(found)}", threads=threads, delta_budget=budget)
        found.append(bytes_of(root / f"out-{len(found)}"))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_recipe_of_any_method_is_planned_alike(method: str, root: Path) -> None:
    """A worker plans from it again."""
    plan = plan_of(root, every_method(method))
    assert plan_of(root, plan.recipe).digest == plan.digest


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.base == "optional"])
def test_the_resolved_recipe_names_no_base_where_the_recipe_named_none(method: str, root: Path) -> None:
    models = [{"model": "tuned"}, {"model": "base"}]
    plan = plan_of(root, {"merge_method": method, "models": models})
    again = plan_of(root, plan.recipe)
    assert again.digest == plan.digest
    assert [tensor.parameters for tensor in again.tensors] == [tensor.parameters for tensor in plan.tensors]


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.symmetric and not spec.most])
def test_the_order_of_the_sources_changes_no_byte(root: Path, method: str) -> None:
    write_model(root / "third", llama_tensors(seed=8, dtype=torch.bfloat16))
    models = [{"model": "base"}, {"model": "tuned"}, {"model": "third"}, {"adapter": "sql"}, {"adapter": "json"}]
    if method in FACTORS:
        write_adapter(root / "style", lora_tensors(seed=4, rank=3), r=3)
        models = [{"adapter": "sql"}, {"adapter": "json"}, {"adapter": "style"}]
    found = []
    for index, order in enumerate((models, models[::-1], [*models[2:], *models[:2]])):
        wanted = {**every_method(method), "models": order}
        merge(plan_of(root, wanted), root / f"out-{index}")
        found.append(bytes_of(root / f"out-{index}"))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_order_changes_no_byte_without_a_base_either(root: Path) -> None:
    models = [{"model": "tuned", "parameters": {"weight": 0.7}}, {"model": "base", "parameters": {"weight": 0.2}}]
    for name, order in (("out", models), ("again", models[::-1])):
        merge(plan_of(root, {"merge_method": "linear", "models": order}), root / name)
    assert bytes_of(root / "out") == bytes_of(root / "again")


def test_another_place_and_another_time_change_no_byte(root: Path) -> None:
    merge(plan_of(root, recipe()), root / "out")
    elsewhere = root / "elsewhere"
    for folder in ("base", "tuned", "sql", "json"):
        shutil.copytree(root / folder, elsewhere / folder)  # keeps the times, which pin a source
    merge(plan_of(elsewhere, recipe()), elsewhere / "out")
    assert bytes_of(root / "out") == bytes_of(elsewhere / "out")


def test_torch_has_its_threads_back_afterwards(root: Path) -> None:
    before = torch.get_num_threads()
    merge(plan_of(root, recipe()), root / "out")
    assert torch.get_num_threads() == before
