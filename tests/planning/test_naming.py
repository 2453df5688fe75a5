"""How an adapter's names are read: as the checkpoint's, as the loaded model's, with a module more or less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import write_adapter, write_model

MODULE = "layers.0.self_attn.q_proj"


def plan_of(root: Path, stored: dict[str, tuple[int, ...]], adapted: list[str], **config: Any) -> Plan:
    """``stored`` are the checkpoint's tensors, ``adapted`` the modules of an 8 by 8 LoRA of rank 2."""
    write_model(root / "base", {name: torch.zeros(shape) for name, shape in stored.items()}, tie_word_embeddings=False)
    tensors = {}
    for module in adapted:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(2, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(8, 2)
    write_adapter(root / "lora", tensors, **config)
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "lora"}]}
    return make_plan(parse_recipe(recipe), Resolver(local=root))


def touched(plan: Plan) -> list[str]:
    return [tensor.name for tensor in plan.tensors if tensor.contributions]


def refusal(root: Path, stored: dict[str, tuple[int, ...]], adapted: list[str], **config: Any) -> MergeyardError:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, stored, adapted, **config)
    return caught.value


@pytest.mark.parametrize(
    ("stored", "adapted"),
    [
        (f"model.{MODULE}", f"model.{MODULE}"),
        (MODULE, f"model.{MODULE}"),
        (MODULE, f"model.language_model.{MODULE}"),
        (f"model.language_model.{MODULE}", MODULE),
        (f"language_model.model.{MODULE}", f"model.language_model.{MODULE}"),  # LLaVA before transformers 4.52
        (f"model.{MODULE}", f"model.language_model.{MODULE}"),  # Qwen2-VL
        ("vision_tower.encoder.layers.0.fc1", "model.vision_tower.encoder.layers.0.fc1"),
        ("visual.blocks.0.attn.proj", "model.visual.blocks.0.attn.proj"),
        ("language_model.lm_head", "lm_head"),
        ("vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.0.attention.attention.query"),
    ],
)
def test_a_name_is_found_under_what_the_checkpoint_calls_it(stored: str, adapted: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {f"{stored}.weight": (8, 8), "other.weight": (8, 8)}, [adapted], modules_to_save=None)
    assert touched(plan) == [f"{stored}.weight"]


def test_several_renamed_parts_of_a_model_are_found_together(tmp_path: Path) -> None:
    stored = {
        f"language_model.model.{MODULE}.weight": (8, 8),
        "vision_tower.layers.0.fc1.weight": (8, 8),
        "multi_modal_projector.linear_1.weight": (8, 8),
    }
    adapted = [
        f"model.language_model.{MODULE}",
        "model.vision_tower.layers.0.fc1",
        "model.multi_modal_projector.linear_1",
    ]
    assert sorted(touched(plan_of(tmp_path, stored, adapted))) == sorted(stored)


def test_two_places_for_one_name_are_refused(tmp_path: Path) -> None:
    stored = {f"encoder.{MODULE}.weight": (8, 8), f"decoder.{MODULE}.weight": (8, 8)}
    error = refusal(tmp_path, stored, [MODULE])
    assert error.code == "adapter_ambiguous"
    assert f"{MODULE}." in error.message


def test_names_that_match_nothing_are_shown_with_those_there_are(tmp_path: Path) -> None:
    stored = {f"model.{MODULE}.weight": (8, 8)}
    error = refusal(tmp_path, stored, [f"model.{MODULE}", "model.layers.7.self_attn.q_proj"])
    assert error.code == "adapter_mismatch"
    assert "layers.7.self_attn.q_proj" in error.message
    assert f"the base has model.{MODULE}.weight" in error.message


def experts(count: int, *, up: tuple[int, int] = (6, 8), without: str = "") -> dict[str, tuple[int, ...]]:
    """Mixtral's: every expert by itself."""
    stored: dict[str, tuple[int, ...]] = {}
    for number in range(count):
        key = f"model.layers.0.block_sparse_moe.experts.{number}"
        stored |= {f"{key}.w1.weight": up, f"{key}.w2.weight": (up[1], up[0]), f"{key}.w3.weight": up}
    return {name: shape for name, shape in stored.items() if name != without}


def write_fused(root: Path, stored: dict[str, tuple[int, ...]], A: tuple[int, int], B: tuple[int, int]) -> Plan:
    write_model(root / "base", {name: torch.zeros(shape) for name, shape in stored.items()})
    key = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{key}.lora_A.weight": torch.zeros(A), f"{key}.lora_B.weight": torch.zeros(B)}
    write_adapter(root / "lora", tensors, target_parameters=["experts.gate_up_proj"])
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "lora"}]}
    return make_plan(parse_recipe(recipe), Resolver(local=root))


def test_fused_experts_are_those_stored_one_by_one(tmp_path: Path) -> None:
    plan = write_fused(tmp_path, experts(3), (6, 8), (12, 6))
    assert touched(plan) == [name for name in experts(3) if not name.endswith("w2.weight")]
    places = {
        tensor.name.split("experts.")[1]: (lora.expert, lora.first_row)
        for tensor in plan.tensors
        for item in tensor.contributions
        if (lora := item.lora) is not None
    }
    assert places["0.w1.weight"] == (0, 0)
    assert places["2.w3.weight"] == (2, 6)


def test_experts_of_which_one_is_missing_are_no_fused_ones(tmp_path: Path) -> None:
    stored = experts(3, without="model.layers.0.block_sparse_moe.experts.1.w3.weight")
    with pytest.raises(MergeyardError) as caught:
        write_fused(tmp_path, stored, (6, 8), (12, 6))
    assert caught.value.code == "adapter_mismatch"


def test_factors_of_other_experts_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MergeyardError) as caught:
        write_fused(tmp_path, experts(3), (4, 8), (12, 4))
    assert caught.value.code == "adapter_shape"


def test_square_matrices_of_experts_are_refused(tmp_path: Path) -> None:
    """PEFT turned its convention round in 0.19, and nothing in the file says which one it follows."""
    with pytest.raises(MergeyardError, match="does not tell") as caught:
        write_fused(tmp_path, experts(3, up=(4, 8)), (6, 8), (8, 6))
    assert caught.value.code == "adapter_ambiguous"


def test_an_earlier_peft_stored_experts_turned(tmp_path: Path) -> None:
    plan = write_fused(tmp_path, experts(3), (6, 12), (8, 6))
    lora = next(item.lora for tensor in plan.tensors for item in tensor.contributions)
    assert lora is not None
    assert lora.transposed
