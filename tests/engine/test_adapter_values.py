"""What kinds of adapters do to values: on a fine-tune, beside a vocabulary that grew, and with values that break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.engine import peft_zoo
from tests.engine.merges import merge, tensors_of
from tests.files import llama_tensors, write_adapter, write_model
from worker.engine import blocks
from worker.engine.factors import Factors

Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def plan_of(root: Path, models: list[dict[str, Any]], **changes: Any) -> Plan:
    recipe = {"base_model": "base", "merge_method": "task_arithmetic", "models": models, **changes}
    return make_plan(parse_recipe(recipe), Resolver(local=root))


@pytest.mark.parametrize("block_values", [90, blocks.BLOCK_VALUES])
def test_dora_takes_its_norms_from_the_model_it_sits_on(
    block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X+adapter with X other than the base: PEFT merges the adapter into X, and that is what the source is."""
    from peft import LoraConfig

    monkeypatch.setattr(blocks, "BLOCK_VALUES", block_values)
    peft_zoo.write_base("llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    tuned = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    peft_zoo.write_base("llama", tmp_path / "tuned")
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    targets = ["q_proj", "down_proj", "embed_tokens"]
    config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=targets, use_dora=True)
    peft_zoo.train("llama", tmp_path / "tuned", tmp_path / "adapter", config)
    expected = peft_zoo.merged_by_peft("llama", tmp_path / "tuned", tmp_path / "adapter")

    merge(plan_of(tmp_path, [{"model": "tuned+adapter"}]), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_tokens_trained_on_a_fine_tune_leave_its_other_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    tuned = llama_tensors(seed=5)
    write_model(tmp_path / "tuned", tuned)
    rows = torch.ones(2, 8)
    tensors = {f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta": rows}
    write_adapter(tmp_path / "lora", tensors, trainable_token_indices=[9, 2])
    merge(plan_of(tmp_path, [{"model": "tuned+lora"}]), tmp_path / "out")
    expected = tuned[f"{EMBEDDING}.weight"].clone()
    expected[[9, 2]] = rows
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{EMBEDDING}.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block_values", [24, blocks.BLOCK_VALUES])
def test_who_did_not_grow_a_vocabulary_has_zeros_there(
    block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source brings two tokens more; a fine-tune and an adapter of the embedding change the old ones alone."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", block_values)
    base, tuned = llama_tensors(), llama_tensors(seed=5)
    write_model(tmp_path / "base", base, tie_word_embeddings=False, vocab_size=16)
    write_model(tmp_path / "tuned", tuned, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(3)
    longer = torch.randn(18, 8, generator=generator)
    write_adapter(
        tmp_path / "grown", {f"base_model.model.{EMBEDDING}.weight": longer}, modules_to_save=["embed_tokens"]
    )
    A, B = torch.randn(2, 16, generator=generator), torch.randn(8, 2, generator=generator)
    factors = {f"base_model.model.{EMBEDDING}.lora_embedding_A": A, f"base_model.model.{EMBEDDING}.lora_embedding_B": B}
    write_adapter(tmp_path / "lora", factors)
    weights = {"adapter:grown": 0.5, "model:tuned": 0.25, "adapter:lora": 2.0}
    models: list[dict[str, Any]] = [
        {kind: name, "parameters": {"weight": weight}}
        for (kind, name), weight in ((key.split(":"), weight) for key, weight in weights.items())
    ]
    plan = plan_of(tmp_path, models)
    merge(plan, tmp_path / "out")

    name = f"{EMBEDDING}.weight"
    old = torch.cat([base[name], torch.zeros(2, 8)])
    expected = old + 0.5 * (longer - old)
    expected[:16] += 0.25 * (tuned[name] - base[name]) + 2.0 * 2.0 * (B @ A).T
    torch.testing.assert_close(tensors_of(tmp_path / "out")[name], expected, rtol=1e-6, atol=1e-6)
    assert plan.documents["config.json"]["vocab_size"] == 18
    assert plan.estimates.output_bytes == sum(value.nbytes for value in base.values()) + 2 * 8 * 4


PARTS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "magnitude": (
        {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 2), f"{Q}.lora_magnitude_vector": (8,)},
        {"use_dora": True},
        "lora_magnitude_vector",
    ),
    "singular values": (
        {f"{Q}.lora_A": (2, 8), f"{Q}.lora_B": (8, 2), f"{Q}.lora_E": (2, 1)},
        {"peft_type": "ADALORA", "init_r": 2},
        "lora_E",
    ),
    "embedding": (
        {f"{EMBEDDING}.lora_embedding_A": (2, 16), f"{EMBEDDING}.lora_embedding_B": (8, 2)},
        {},
        "lora_embedding_A",
    ),
    "saved module": ({"model.norm.weight": (8,)}, {"modules_to_save": ["norm"]}, "model.norm.weight"),
    "bias of B": (
        {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 2), f"{Q}.lora_B.bias": (8,)},
        {"lora_bias": True},
        "lora_B.bias",
    ),
    "trained tokens": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 8)},
        {"trainable_token_indices": [3]},
        EMBEDDING,
    ),
    "experts": (
        {"model.mlp.experts.lora_A.weight": (4, 8), "model.mlp.experts.lora_B.weight": (6, 4)},
        {"target_parameters": ["experts.gate_up_proj"]},
        "lora_A",
    ),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_values_that_are_not_finite_are_named(part: str, bad: float, tmp_path: Path) -> None:
    shapes, config, named = PARTS[part]
    stored = llama_tensors() | {f"{Q}.bias": torch.zeros(8), "model.mlp.experts.gate_up_proj": torch.zeros(2, 6, 8)}
    write_model(tmp_path / "base", stored, tie_word_embeddings=False)
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    broken = next(name for name in tensors if named in name)
    tensors[broken].view(-1)[-1] = bad
    write_adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(MergeyardError) as caught:
        merge(plan_of(tmp_path, [{"adapter": "lora"}]), tmp_path / "out")
    assert caught.value.code == "source_not_finite"
    assert named in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_values", [24, blocks.BLOCK_VALUES])
@pytest.mark.parametrize("module", [Q, EMBEDDING])
def test_dora_on_an_output_without_weights_is_refused(
    module: str, block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is zero, and PEFT divides by it: NaN."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", block_values)
    stored = llama_tensors()
    weight = stored[f"{module}.weight"]
    weight[3 if module == Q else (slice(None), 3)] = 0
    write_model(tmp_path / "base", stored, tie_word_embeddings=False)
    names = ("lora_A.weight", "lora_B.weight") if module == Q else ("lora_embedding_A", "lora_embedding_B")
    A, B = torch.ones(2, 8 if module == Q else 16), torch.ones(8, 2)
    B[3] = 0
    tensors = {f"base_model.model.{module}.{name}": value for name, value in zip(names, (A, B), strict=True)}
    tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.ones(8)
    write_adapter(tmp_path / "lora", tensors, use_dora=True)
    with pytest.raises(MergeyardError, match="outputs whose weights are all zero") as caught:
        merge(plan_of(tmp_path, [{"adapter": "lora"}]), tmp_path / "out")
    assert caught.value.code == "adapter_invalid"


def test_adalora_divides_by_the_rank_that_was_saved(tmp_path: Path) -> None:
    """Some versions of PEFT saved ``ranknum`` beside the factors."""
    base = llama_tensors()
    write_model(tmp_path / "base", base)
    generator = torch.Generator().manual_seed(3)
    A, B, E = (torch.randn(*shape, generator=generator) for shape in ((2, 8), (8, 2), (2, 1)))
    key = f"base_model.model.{Q}"
    tensors = {f"{key}.lora_A": A, f"{key}.lora_B": B, f"{key}.lora_E": E, f"{key}.ranknum": torch.tensor([5.0])}
    write_adapter(tmp_path / "lora", tensors, peft_type="ADALORA", init_r=2)
    merge(plan_of(tmp_path, [{"adapter": "lora"}]), tmp_path / "out")
    expected = base[f"{Q}.weight"] + 4 / (5 + 1e-5) * B @ (A * E)
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{Q}.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (4, 1, 1)])
def test_any_range_of_a_product_is_that_range_of_the_whole(shape: tuple[int, int, int]) -> None:
    matrices, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(matrices, rows, 2, generator=generator),
        torch.randn(matrices, 2, columns, generator=generator),
    )
    factors = Factors(left=left, right=right, scale=0.5)
    whole = (0.5 * left @ right).flatten()
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            found = torch.full((stop - start,), float("nan"))
            factors.add_product(start, stop, found, keep=False)
            torch.testing.assert_close(found, whole[start:stop])
