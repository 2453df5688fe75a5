"""Adapters: which are taken, with what scale, and which are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.sources.adapters import load_adapter
from tests.files import listing, lora_tensors, write_adapter

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def scales(folder: Path) -> dict[str, float]:
    return {module.module: module.scalings["weight"].scale for module in load_adapter(listing(folder), "x").modules}


def test_plain_lora_scales_by_alpha_over_r(tmp_path: Path) -> None:
    found = scales(write_adapter(tmp_path))
    assert len(found) == 4
    assert set(found.values()) == {2.0}
    assert "model.layers.0.self_attn.q_proj" in found


def test_rslora_scales_by_alpha_over_the_root_of_r(tmp_path: Path) -> None:
    assert set(scales(write_adapter(tmp_path, use_rslora=True)).values()) == {4 / math.sqrt(2)}


def test_patterns_are_matched_as_peft_matches_them(tmp_path: Path) -> None:
    tensors = lora_tensors(layers=1)
    tensors[f"{KEY}.lora_A.weight"] = torch.zeros(4, 8)
    tensors[f"{KEY}.lora_B.weight"] = torch.zeros(8, 4)
    folder = write_adapter(tmp_path, tensors, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.mlp.up_proj": 16})
    assert scales(folder) == {"model.layers.0.self_attn.q_proj": 1.0, "model.layers.0.mlp.up_proj": 8.0}


def test_wrapping_prefixes_and_the_default_name_are_stripped(tmp_path: Path) -> None:
    tensors = {
        "base_model.model._orig_mod.model.q.lora_A.default.weight": torch.zeros(2, 8),
        "base_model.model._orig_mod.model.q.lora_B.default.weight": torch.zeros(8, 2),
    }
    assert list(scales(write_adapter(tmp_path, tensors))) == ["model.q"]


def test_saved_modules_keep_their_plain_name(tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.score.weight": torch.zeros(2, 8)}
    adapter = load_adapter(listing(write_adapter(tmp_path, tensors, modules_to_save=["score"])), "x")
    assert list(adapter.saved) == ["score.weight"]


def test_fields_nobody_knows_are_fine_where_they_say_nothing(tmp_path: Path) -> None:
    assert len(scales(write_adapter(tmp_path, from_the_future=None, also=False, and_this=[], arrow_config=None))) == 4


@pytest.mark.parametrize(
    ("config", "extra", "code"),
    [
        ({}, {f"{KEY}.lora_magnitude_vector": (8,)}, "adapter_invalid"),
        ({}, {f"{KEY}.lora_B.bias": (8,)}, "adapter_invalid"),
        ({}, {f"{KEY}.lora_E": (2, 1)}, "adapter_invalid"),
        ({}, {f"{KEY}.lora_C.weight": (8,)}, "adapter_leftover"),
        ({}, {"base_model.model.stray.weight": (8,)}, "adapter_leftover"),
        ({}, {"base_model.model.norm.bias": (8,)}, "adapter_leftover"),
        ({}, {"base_model.model.lonely.lora_A.weight": (2, 8)}, "adapter_incomplete"),
        ({}, {"base_model.model.lonely.lora_embedding_B": (8, 2)}, "adapter_incomplete"),
        ({"use_dora": True}, {}, "adapter_incomplete"),
        ({"lora_bias": True}, {}, "adapter_incomplete"),
        ({"peft_type": "ADALORA"}, {}, "adapter_incomplete"),
        ({"modules_to_save": ["lm_head"]}, {}, "adapter_incomplete"),
        ({"trainable_token_indices": [1]}, {}, "adapter_incomplete"),
        ({}, {"base_model.model.e.token_adapter.trainable_tokens_delta": (1, 8)}, "adapter_invalid"),
        (
            {"trainable_token_indices": [1, 2]},
            {"base_model.model.e.token_adapter.trainable_tokens_delta": (1, 8)},
            "adapter_invalid",
        ),
        (
            {"trainable_token_indices": [1, 1]},
            {"base_model.model.e.token_adapter.trainable_tokens_delta": (2, 8)},
            "adapter_invalid",
        ),
        ({"bias": "some"}, {}, "adapter_invalid"),
        (
            {},
            {"base_model.model.c.lora_A.weight": (2, 8, 3), "base_model.model.c.lora_B.weight": (8, 1, 1)},
            "adapter_grouped_conv",
        ),
        (
            {},
            {"base_model.model.c.lora_A.weight": (2, 8), "base_model.model.c.lora_B.weight": (8, 3)},
            "adapter_invalid",
        ),
        (
            {},
            {"base_model.model.c.lora_A.weight": (3, 8), "base_model.model.c.lora_B.weight": (8, 3)},
            "adapter_invalid",
        ),
        ({}, {f"{KEY}.lora_A.default.weight": (2, 8)}, "adapter_invalid"),
    ],
)
def test_keys_that_do_not_belong_are_refused(
    tmp_path: Path, config: dict[str, Any], extra: dict[str, tuple[int, ...]], code: str
) -> None:
    tensors = {**lora_tensors(), **{name: torch.zeros(shape) for name, shape in extra.items()}}
    with pytest.raises(MergeyardError) as caught:
        load_adapter(listing(write_adapter(tmp_path, tensors, **config)), "x")
    assert caught.value.code == code


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(MergeyardError) as caught:
        load_adapter(listing(tmp_path), "x")
    assert caught.value.code == "pickle_refused"


@pytest.mark.timeout(10)
@pytest.mark.parametrize("pattern", ["(a|a)" * 38 + "b", "(a", "x" * 300])
def test_a_hostile_pattern_is_refused_quickly(tmp_path: Path, pattern: str) -> None:
    tensors = {f"{'a' * 100}.lora_A.weight": torch.zeros(2, 8), f"{'a' * 100}.lora_B.weight": torch.zeros(8, 2)}
    with pytest.raises(MergeyardError) as caught:
        load_adapter(listing(write_adapter(tmp_path, tensors, rank_pattern={pattern: 2})), "x")
    assert caught.value.code == "adapter_invalid"


@pytest.mark.parametrize(
    "pattern", [r"layers\.[0-9]+\.self_attn\.q_proj", "(?:q_proj|x)", r"model\.layers\.\d{1,2}\..*q_proj"]
)
def test_peft_patterns_that_are_regular_expressions_are_taken(tmp_path: Path, pattern: str) -> None:
    found = scales(write_adapter(tmp_path, alpha_pattern={pattern: 16}))
    assert found["model.layers.0.self_attn.q_proj"] == 8.0
    assert found["model.layers.0.mlp.up_proj"] == 2.0


def test_the_base_layer_of_a_head_is_passed_over(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 8),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(16, 2),
        "base_model.model.lm_head.base_layer.weight": torch.zeros(16, 8),
    }
    adapter = load_adapter(listing(write_adapter(tmp_path, tensors)), "x")
    assert [module.module for module in adapter.modules] == ["lm_head"]
    assert not adapter.saved


@pytest.mark.parametrize("r", [0, -1, "2", None, True, 1e400, 3])
def test_a_rank_that_cannot_be_is_refused(tmp_path: Path, r: object) -> None:
    with pytest.raises(MergeyardError) as caught:
        load_adapter(listing(write_adapter(tmp_path, r=r)), "x")
    assert caught.value.code in ("adapter_invalid", "source_format")
