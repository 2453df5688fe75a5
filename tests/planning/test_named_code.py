"""What makes a loader run code that a model's files name is not written, at any depth and in any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.planning.named_code import without_code
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import write_adapter, write_model

EVIL = {"AutoConfig": "evil/repo--configuration.Evil"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "sql", auto_mapping={"base_model_class": "system", "parent_library": "os"})
    return tmp_path


def plan_of(root: Path, **changes: Any) -> Plan:
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "sql"}], **changes}
    return make_plan(parse_recipe(recipe), Resolver(roots=[root]))


@pytest.mark.parametrize(
    "named",
    [
        {"auto_map": EVIL},
        {"vision_config": {"auto_map": EVIL}},
        {"text_config": {"parts": [{"inner": {"auto_map": EVIL}}]}},
        {"custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}}},
        {"trust_remote_code": True},
        {"attn_implementation": "evil/kernels"},
        {"_attn_implementation": "evil/kernels@main:attention"},
        {"_attn_implementation_internal": "evil/kernels"},
        {"attn_implementation": {"": "sdpa", "vision_config": "evil/kernels"}},
        {"experts_implementation": "evil/kernels"},
        {"text_config": {"attn_implementation": "evil/kernels"}},
    ],
    ids=lambda named: json.dumps(named)[:60],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "config_sentence_transformers.json",
    ],
)
def test_it_is_left_out_of_every_config(root: Path, name: str, named: dict[str, Any]) -> None:
    path = root / "base" / name
    known = json.loads(path.read_text()) if path.exists() else {"kept": {"deep": [1]}}
    path.write_text(json.dumps({**known, **named}))
    plan = plan_of(root)
    written = json.dumps(plan.documents[name])
    assert "vil" not in written and "trust_remote_code" not in written
    assert known.items() <= plan.documents[name].items()  # type: ignore[union-attr]
    assert name not in [file.name for file in plan.companions]


def test_what_names_no_code_stays_as_it_was() -> None:
    config = {"attn_implementation": "sdpa", "_attn_implementation": {"": "eager"}, "architectures": ["X"], "a": [{}]}
    assert without_code(config) == config


def test_a_config_without_any_is_copied_byte_for_byte(root: Path) -> None:
    (root / "base" / "generation_config.json").write_text('{ "do_sample":  true }')
    plan = plan_of(root)
    assert "generation_config.json" not in plan.documents
    assert "generation_config.json" in [file.name for file in plan.companions]


def test_a_token_of_that_name_stays(root: Path) -> None:
    """The keys of a vocabulary are any words at all."""
    vocabulary = {"auto_map": 0, "b": 1}
    document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    for number, name in enumerate(("base", "other")):
        folder = write_model(root / name)
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "added_tokens.json").write_text(json.dumps({f"trust_remote_code{number}": 2, "custom_pipelines": 3}))
    plan = plan_of(root, merge_method="linear", models=[{"model": "other"}], tokenizer_source="union")
    written = plan.documents["tokenizer.json"]
    assert isinstance(written, dict) and written["model"]["vocab"] == vocabulary
    assert "custom_pipelines" in plan.documents["added_tokens.json"]


@pytest.mark.parametrize(
    ("modules", "stays"),
    [
        (
            [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}],
            True,
        ),
        ([{"type": "sentence_transformers.models.Transformer"}, {"type": "custom_st.Transformer"}], False),
        ([{"type": "sentence_transformers_evil.X"}], False),
        ([{"type": "subprocess.Popen"}], False),
        ([{}], False),
        ([7], False),
        ({}, False),
    ],
)
def test_modules_of_other_libraries_are_not_written(root: Path, modules: Any, stays: bool) -> None:
    (root / "base" / "modules.json").write_text(json.dumps(modules))
    plan = plan_of(root)
    assert ("modules.json" in [file.name for file in plan.companions]) is stays
    assert "modules.json" not in plan.documents


def test_what_an_adapter_names_is_not_in_the_adapter_that_is_written(root: Path) -> None:
    plan = plan_of(root, merge_method="linear", output={"kind": "adapter"})
    assert "auto_mapping" not in plan.documents["adapter_config.json"]
