"""What a recipe says of the tokenizer is planned from files alone, and everything wrong with it has its place."""

from __future__ import annotations

import json
import shutil
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
from tests.words import TOOL, USER, tokenizer, write_speaker

MODELS = [{"model": "base"}, {"model": "chat"}]


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speakers")
    write_speaker(root / "base", tokenizer())
    write_speaker(root / "chat", tokenizer(extra=[USER, TOOL]), seed=1)
    return root


@pytest.fixture
def root(speakers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(speakers, tmp_path / "root"))


def plan_of(root: Path, **changes: Any) -> Plan:
    value = {"base_model": "base", "merge_method": "linear", "models": MODELS, "tokenizer": {"source": "union"}}
    return make_plan(parse_recipe({**value, **changes}), Resolver(roots=[root]))


def problems_of(root: Path, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, **changes)
    return [(problem.code, problem.where) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_model": None},
        {"base_model": None, "models": [{"model": f"{name}+norm"} for name in ("base", "chat", "few")]},
        {
            "base_model": None,
            "merge_method": "ties",
            "models": None,
            "slices": [{"base_model": "chat", "sources": [{"model": "base", "layer_range": [0, 1]}]}],
        },
        {"tokenizer": None, "tokenizer_source": "chat"},
        {"tokenizer": None, "chat_template": "auto", "models": [{"model": "base"}]},
        {
            "tokenizer": {
                "tokens": {
                    USER: {"source": "chat"},
                    "a": {},
                    "<n>": {"source": {"kind": "zero"}},
                    "b": {"source": {"kind": "model_token", "model": "models:chat", "token_id": 1}, "force": True},
                },
                "pad_to_multiple_of": 8,
            }
        },
    ],
)
def test_the_resolved_recipe_plans_to_the_same_digest(root: Path, changes: dict[str, Any]) -> None:
    write_speaker(root / "few", tokenizer(size=270), seed=2)
    tensors = {"base_model.model.model.norm.weight": torch.ones(16)}
    write_adapter(root / "norm", tensors, modules_to_save=["norm"])
    plan = plan_of(root, **changes)
    again = make_plan(parse_recipe(json.dumps(plan.recipe)), Resolver(roots=[root]))
    assert (again.digest, again.recipe) == (plan.digest, plan.recipe)
    assert again.tensors == plan.tensors


def test_without_a_word_of_the_tokenizer_it_stays_the_base_s(root: Path) -> None:
    plan = plan_of(root, tokenizer=None, models=[{"model": "base"}])
    assert plan.tokenizers == () and "tokenizer" not in plan.recipe
    assert "tokenizer.json" in {file.name for file in plan.companions}


def test_without_a_word_of_the_tokenizer_other_tokens_in_the_same_rows_are_warned_of(root: Path) -> None:
    for seed, (name, extra) in enumerate({"one": USER, "two": TOOL, "three": TOOL}.items()):
        write_speaker(root / name, tokenizer(extra=[extra]), seed=seed)
    models = [{"model": "one"}, {"model": "two"}]
    (warning,) = plan_of(root, base_model="one", models=models, tokenizer=None).warnings
    assert (warning.code, warning.where) == ("tokenizer_mismatch", "models[1]")
    assert TOOL in warning.message
    assert plan_of(root, base_model="two", models=[{"model": "three"}], tokenizer=None).warnings == ()


def test_the_tokenizers_that_were_read_decide_the_digest(root: Path) -> None:
    before = plan_of(root)
    assert {(item.reference, file.name) for item in before.tokenizers for file in item.files} == {
        (f"models:{model}", name) for model in ("base", "chat") for name in ("tokenizer.json", "tokenizer_config.json")
    }
    path = root / "chat" / "tokenizer.json"
    path.write_text(path.read_text().replace(TOOL, "<|pool|>"))
    assert plan_of(root).digest != before.digest


def test_vocabularies_of_two_sizes_need_a_word(root: Path) -> None:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, tokenizer=None)
    assert {problem.code for problem in caught.value.problems} == {"model_mismatch"}
    assert all("tokenizer_source" in problem.message for problem in caught.value.problems)


def test_every_wrong_token_has_its_place(root: Path) -> None:
    tokens = {
        USER: {"source": "base"},
        "a": {"source": "nowhere"},
        "b": {"source": {"kind": "model_token", "model": "chat", "token_id": 100_000}},
        "c": {"source": {"kind": "model_token", "model": "chat", "token": "<none>"}},
        "d": {"source": "lone"},
    }
    write_model(root / "lone")
    assert problems_of(root, tokenizer={"source": "union", "tokens": tokens}) == [
        ("token_not_found", f"tokenizer.tokens.{USER}.source"),
        ("source_not_found", "tokenizer.tokens.a.source"),
        ("token_not_found", "tokenizer.tokens.b.source"),
        ("token_not_found", "tokenizer.tokens.c.source"),
        ("recipe_invalid", "tokenizer.tokens.d.source"),
    ]


def test_damaged_tokenizers_are_named_by_their_models(root: Path) -> None:
    for model in ("base", "chat"):
        (root / model / "tokenizer.json").write_text("{}")
    assert ("tokenizer_invalid", "base_model") in problems_of(root)
    (root / "base" / "tokenizer.json").unlink()
    assert ("tokenizer_unsupported", "base_model") in problems_of(root)


def test_a_source_s_damaged_tokenizer_is_named(root: Path) -> None:
    (root / "chat" / "tokenizer.json").write_text("{}")
    assert problems_of(root) == [("tokenizer_invalid", "models[1].model")]


def test_what_another_module_is_merged_from_has_no_part_in_the_vocabulary(root: Path) -> None:
    layers = ("language_model.layers.0.x.weight", "vision_tower.layers.0.x.weight")
    for name, rows in (("seeing", 3), ("charts", 5)):
        stored = {layer: torch.ones(4, 4) for layer in layers}
        stored["language_model.embed_tokens.weight"] = torch.ones(rows, 4)
        write_model(root / name, stored, tie_word_embeddings=False)
        words = {"model": {"type": "BPE", "vocab": {chr(97 + row): row for row in range(rows)}, "merges": []}}
        (root / name / "tokenizer.json").write_text(json.dumps(words))
    changes: dict[str, Any] = {"base_model": "seeing", "merge_method": "task_arithmetic", "models": None}
    changes["modules"] = {"vision_tower": {"models": [{"model": "charts"}]}}
    plan = plan_of(root, **changes)
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    assert shapes["language_model.embed_tokens.weight"] == (3, 4)
    tokens = {"a": {"source": "charts"}}
    found = problems_of(root, **changes, tokenizer={"source": "union", "tokens": tokens})
    assert found == [("recipe_invalid", "tokenizer.tokens.a.source")]


def test_a_slice_of_another_architecture_is_named(root: Path) -> None:
    write_model(root / "other", {"encoder.layers.0.x.weight": torch.zeros(16, 16)})
    slices = [{"base_model": "base", "sources": [{"model": "other", "layer_range": [0, 1]}]}]
    changes = {"base_model": None, "models": None, "merge_method": "ties", "slices": slices}
    assert problems_of(root, **changes) == [("model_mismatch", "slices[0].sources[0]")]


def test_a_tokenizer_may_come_from_a_model_that_is_not_merged(root: Path) -> None:
    (root / "words").mkdir()
    tokenizer(extra=[USER]).save_pretrained(root / "words")
    plan = plan_of(root, tokenizer={"source": "words"})
    assert plan.recipe["tokenizer"]["source"] == "models:words"
    assert ("source_not_found", "tokenizer.source") in problems_of(root, tokenizer={"source": "nowhere"})
    (root / "empty").mkdir()
    assert ("tokenizer_unsupported", "tokenizer.source") in problems_of(root, tokenizer={"source": "empty"})


def test_a_model_without_a_tokenizer_is_taken_to_speak_the_base_s(root: Path) -> None:
    write_speaker(root / "chat", tokenizer(), seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "chat" / name).unlink()
    (warning,) = plan_of(root).warnings
    assert (warning.code, warning.where) == ("tokenizer_mismatch", "models[1]")


def test_ordinary_tokens_that_become_added_ones_are_warned_of(root: Path) -> None:
    path = root / "chat" / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["quickly"] = value["model"]["vocab"].pop("z")
    path.write_text(json.dumps(value))
    assert [warning.code for warning in plan_of(root).warnings] == ["tokenizer_mismatch"]


@pytest.mark.parametrize(("letters", "refused"), [(16, False), (15, True)])
def test_factors_on_an_embedding_are_refused_where_its_rows_move(root: Path, letters: int, refused: bool) -> None:
    """With 15 tokens the sixteenth row is left out."""
    write_model(root / "tiny", llama_tensors(), tie_word_embeddings=False)
    words = {"model": {"type": "BPE", "vocab": {chr(97 + index): index for index in range(letters)}, "merges": []}}
    (root / "tiny" / "tokenizer.json").write_text(json.dumps(words))
    module = "base_model.model.model.embed_tokens"
    factors = {f"{module}.lora_embedding_A": torch.ones(2, 16), f"{module}.lora_embedding_B": torch.ones(8, 2)}
    write_adapter(root / "sql", factors)
    changes = {"base_model": "tiny", "models": [{"adapter": "sql"}], "merge_method": "task_arithmetic"}
    if refused:
        assert problems_of(root, **changes) == [("adapter_vocabulary", "models[0]")]
        with pytest.raises(MergeyardError, match="rows cannot be put into another vocabulary; merge the adapter into"):
            plan_of(root, **changes)
    else:
        (tensor,) = (item for item in plan_of(root, **changes).tensors if item.contributions)
        assert tensor.contributions[0].lora is not None and tensor.shape == (16, 8)


def test_a_vocabulary_that_an_adapter_grew_has_no_names_for_its_rows(root: Path) -> None:
    """Beside tokenizer keys; without them its rows are the result's."""
    tokens = len(tokenizer())
    rows = {
        f"base_model.model.{module}.weight": torch.ones(tokens + 2, 16) for module in ("model.embed_tokens", "lm_head")
    }
    write_adapter(root / "grown", rows, modules_to_save=["embed_tokens", "lm_head"])
    changes = {"models": [{"model": "base"}, {"adapter": "grown"}], "merge_method": "task_arithmetic"}
    assert plan_of(root, **changes, tokenizer=None).documents["config.json"]["vocab_size"] == tokens + 2
    assert problems_of(root, **changes) == [("adapter_vocabulary", "models[1]")]
    with pytest.raises(MergeyardError, match=f"{tokens + 2} rows for tokens that no tokenizer names; let PEFT merge"):
        plan_of(root, **changes)


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"tokenizer_source": "base"}, "recipe_invalid", "tokenizer_source"),
        ({"tokenizer": {"sauce": "union"}}, "unknown_key", "tokenizer.sauce"),
        ({"tokenizer": "union"}, "recipe_invalid", "tokenizer"),
        ({"tokenizer": {"source": ""}}, "recipe_invalid", "tokenizer.source"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "recipe_invalid", "tokenizer.pad_to_multiple_of"),
        ({"tokenizer": {"pad_to_multiple_of": 1.5}}, "recipe_invalid", "tokenizer.pad_to_multiple_of"),
        ({"tokenizer": {"tokens": []}}, "recipe_invalid", "tokenizer.tokens"),
        ({"tokenizer": {"tokens": {"a": {"force": True}}}}, "recipe_invalid", "tokenizer.tokens.a"),
        ({"tokenizer": {"tokens": {"a": {"horse": True}}}}, "unknown_key", "tokenizer.tokens.a.horse"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "x"}}}}},
            "recipe_invalid",
            "tokenizer.tokens.a.source",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "zero", "modal": "x"}}}}},
            "unknown_key",
            "tokenizer.tokens.a.source.modal",
        ),
        ({"chat_template": "chatlm"}, "recipe_invalid", "chat_template"),
    ],
)
def test_a_wrong_word_has_its_code_and_place(root: Path, changes: dict[str, Any], code: str, where: str) -> None:
    assert problems_of(root, **changes) == [(code, where)]
