"""A full fine-tune written as an adapter: real steps of an optimiser, PEFT to load the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from tests.engine.merges import merge, plan_of, tensors_of
from tests.engine.peft_zoo import load, steps, write_base
from tests.engine.test_adapter_output import logits_of, logits_of_adapter

ARCHITECTURES = ("llama", "tied llama", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each architecture the base, and what all of its parameters became in a few steps; read only."""
    root = tmp_path_factory.mktemp("models")
    for kind in ARCHITECTURES:
        write_base(kind, root / kind)
        model = load(kind, root / kind)
        steps(kind, model, seed=3)
        model.save_pretrained(root / f"{kind}-tuned")
    return root


def extraction(kind: str, **output: Any) -> dict[str, Any]:
    return {
        "base_model": kind,
        "merge_method": "task_arithmetic",
        "models": [{"model": f"{kind}-tuned"}],
        "output": {"kind": "adapter", **output},
    }


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_at_full_rank_with_everything_else_saved_it_is_the_fine_tune(models: Path, tmp_path: Path, kind: str) -> None:
    merge(plan_of(models, extraction(kind, rank=256, other="save")), tmp_path / "out")
    expected = logits_of(models / f"{kind}-tuned")
    assert (expected - logits_of(models / kind)).abs().max() > 1e-2
    found = logits_of_adapter(models / kind, tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapter_written_here_is_read_here(models: Path, tmp_path: Path, kind: str, method: str) -> None:
    """With norms, biases and embeddings (of the last two tied to their heads) saved whole."""
    written = {**extraction(kind, rank=256, other="save"), "merge_method": method}
    merge(plan_of(models, written), tmp_path / "adapter")
    merge(plan_of(models, {**written, "output": {}}), tmp_path / "checkpoint")
    shutil.copytree(models / kind, tmp_path / kind)
    again = {"base_model": kind, "merge_method": method, "models": [{"adapter": "adapter"}]}
    merge(plan_of(tmp_path, again), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "checkpoint")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
def test_the_names_are_those_of_the_loaded_model_where_a_checkpoint_leaves_out_its_outer_module(
    models: Path, tmp_path: Path
) -> None:
    """As GPT-2 is published: ``h.0…`` for ``transformer.h.0…``."""
    from safetensors.torch import save_file

    for name in ("gpt2", "gpt2-tuned"):
        shutil.copytree(models / name, tmp_path / name)
        tensors = {key.removeprefix("transformer."): value for key, value in tensors_of(models / name).items()}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    merge(plan_of(tmp_path, extraction("gpt2", rank=256, other="save")), tmp_path / "out")
    found = logits_of_adapter(models / "gpt2", tmp_path / "out")
    torch.testing.assert_close(found, logits_of(models / "gpt2-tuned"), rtol=0, atol=1e-4)


def test_what_did_not_change_is_neither_refused_nor_written(models: Path, tmp_path: Path) -> None:
    """From headers alone every norm of a full model may have changed; its weights say that none has."""
    from safetensors.torch import save_file

    shutil.copytree(models / "llama", tmp_path / "llama")
    shutil.copytree(models / "llama", tmp_path / "llama-tuned")
    tensors = tensors_of(models / "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.1}, tmp_path / "llama-tuned" / "model.safetensors", {"format": "pt"})
    manifest = merge(plan_of(tmp_path, extraction("llama", rank=8)), tmp_path / "out")
    assert all("lora_" in key for key in tensors_of(tmp_path / "out"))
    assert {key for key, entry in manifest.statistics.items() if entry.merged_norm > 0} == {name}


def test_what_changed_and_no_lora_can_hold_is_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeyardError, match=r"model\.embed_tokens\.weight.*other: save") as refused:
        merge(plan_of(models, extraction("llama", rank=8)), tmp_path / "out")
    assert refused.value.code == "lora_cannot_hold"
    assert list(tmp_path.iterdir()) == []
