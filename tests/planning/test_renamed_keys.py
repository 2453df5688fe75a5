"""Old names beside new ones; that transformers 4 and 5 then compute the same is shown in tests/hub."""

from __future__ import annotations

from typing import Any

import pytest

from app.planning.renamed_keys import with_old_names

ROPE = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("config.json", {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None, "num_local_experts": 2}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image": "<i>"}}),
        ("tokenizer.json", {"tokenizer_class": "TokenizersBackend", "rope_parameters": ROPE}),
    ],
)
def test_what_has_no_new_names_stays_as_it_is(name: str, document: dict[str, Any]) -> None:
    assert with_old_names(name, document) == document


def test_what_stands_there_already_stays() -> None:
    config = {"model_type": "llama", "rope_parameters": ROPE, "rope_theta": 1.0}
    assert with_old_names("config.json", config) == config


def test_configs_within_are_written_for_both_and_twice_changes_nothing() -> None:
    config = {"model_type": "x_vl", "text_config": {"model_type": "llama", "rope_parameters": ROPE}}
    once = with_old_names("config.json", config)
    assert once["text_config"]["rope_theta"] == 5e5 and "rope_scaling" not in once["text_config"]
    assert with_old_names("config.json", once) == once


def test_scaling_that_is_more_than_a_kind_is_kept() -> None:
    rope = {**ROPE, "mrope_section": [2, 3, 3]}
    found = with_old_names("config.json", {"model_type": "qwen2_vl_text", "rope_parameters": rope})
    assert found["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}


def test_a_tokenizer_has_its_old_class_and_list() -> None:
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<t>"], "bos_token": "<s>"}
    assert with_old_names("tokenizer_config.json", new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<t>"],
        "bos_token": "<s>",
    }
