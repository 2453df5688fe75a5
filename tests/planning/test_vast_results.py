"""Small files and recipes that stand for a vast result: the plan stays small, and no merge of it begins."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import llama_tensors, write_adapter, write_model
from worker.engine.run import merge_to_folder

LAYERS = [{"model": "base", "layer_range": [0, 2]}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", num_hidden_layers=2)
    write_adapter(tmp_path / "sql")
    return tmp_path


def plan_of(root: Path, recipe: dict[str, Any]) -> Plan:
    return make_plan(parse_recipe(recipe), Resolver(roots=[root]))


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "passthrough", "slices": [{"sources": LAYERS}] * 50},
        {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "sql"}] * 50},
        {"merge_method": "linear", "models": [{"model": "base", "parameters": {"weight": 1}}] * 50},
        {"merge_method": "linear", "slices": [{"sources": [{"model": "base+sql", "layer_range": [0, 1]}] * 50}]},
    ],
    ids=["slices", "adapters", "models", "adapters-in-slices"],
)
def test_tensors_times_sources_are_bounded(root: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.planning.resolving.MAX_PARTS", 150)
    with pytest.raises(MergeyardError, match="more than 150 tensors") as caught:
        plan_of(root, recipe)
    assert caught.value.code == "recipe_invalid"


def with_tokens(folder: Path, embedding: torch.Tensor, **others: torch.Tensor) -> Path:
    write_model(folder, {**llama_tensors(), "model.embed_tokens.weight": embedding, **others})
    document = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


PADDED = {
    "base_model": "wide",
    "merge_method": "linear",
    "models": [{"model": "tuned", "parameters": {"weight": 1}}],
    "tokenizer": {"source": "union", "pad_to_multiple_of": 1_000_000},
}


def test_megabytes_that_claim_terabytes_are_refused_before_memory_or_disk_is_taken(root: Path) -> None:
    """Two rows of 4 MB, and as many as a million that are their mean."""
    for name in ("wide", "tuned"):
        with_tokens(root / name, torch.zeros(2, 1 << 20), extra=torch.full((2,), len(name)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(root, PADDED)
    assert plan.estimates.output_bytes > 1 << 41
    with pytest.raises(MergeyardError) as caught:
        merge_to_folder(plan, root / "out")
    assert caught.value.code == "disk_full"
    assert sorted(path.name for path in root.iterdir()) == ["base", "sql", "tuned", "wide"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_rows_that_are_not_there_do_not_stand_for_any(root: Path) -> None:
    """An embedding of no rows takes no bytes, however wide it says it is."""
    for name in ("wide", "tuned"):
        with_tokens(root / name, torch.zeros(0, 1 << 24))
    with pytest.raises(MergeyardError, match="0 rows") as caught:
        plan_of(root, PADDED)
    assert caught.value.code == "tokenizer_invalid"


def test_an_adapter_of_a_vast_rank_says_what_it_takes(root: Path) -> None:
    recipe = {
        "base_model": "base",
        "merge_method": "linear",
        "models": [{"adapter": "sql"}],
        "output": {"kind": "adapter", "rank": 100_000},
    }
    plan = plan_of(root, recipe)
    assert plan.estimates.output_bytes == 4 * 100_000 * 2 * (8 + 8 + 16 + 8)
