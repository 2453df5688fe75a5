"""Whole merges on the GPU's kernels: the very bytes that the CPU's write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.merges import merge, plan_of
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model
from worker.engine import blocks

ADAPTERS = [{"adapter": "sql", "parameters": {"weight": 0.7}}, {"adapter": "json"}]
MODELS = [{"model": "tuned"}, {"model": "other", "parameters": {"weight": -0.3}}]
RECIPES: dict[str, dict[str, Any]] = {
    "adapters": {"merge_method": "ties", "models": ADAPTERS, "parameters": {"density": 0.4}},
    "full fine-tunes": {"merge_method": "ties", "models": MODELS, "parameters": {"density": 0.3}},
    "both, thresholds of the whole model": {
        "merge_method": "ties",
        "models": [*ADAPTERS, {"model": "tuned+json"}, *MODELS],
        "parameters": {"density": 0.4, "dialect": "paper"},
    },
    "a method with a mask": {"merge_method": "dare_ties", "models": ADAPTERS, "parameters": {"density": 0.4}},
    "a method of its own arithmetic": {
        "merge_method": "model_stock",
        "models": [{"adapter": "sql"}, {"model": "tuned"}, {"model": "other"}],
    },
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 40)  # five rows of eight
    write_model(tmp_path / "base", llama_tensors(dtype=torch.bfloat16))
    for seed, name in ((5, "tuned"), (6, "other")):
        write_model(tmp_path / name, llama_tensors(seed=seed, dtype=torch.bfloat16))
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2, rank=3), r=3)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_the_cuda_room_writes_the_bytes_of_the_cpu_room(name: str, root: Path) -> None:
    plan = plan_of(root, {"base_model": "base", **RECIPES[name]})
    for room in ("cpu", "cuda"):
        merge(plan, root / room, room=room, threads=3)
    for weights in (root / "cpu").glob("*.safetensors"):
        assert (root / "cuda" / weights.name).read_bytes() == weights.read_bytes()
