"""Plans: made from headers alone, complete, and honest about everything that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.planning.plan import Plan, TensorPlan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned", llama_tensors(seed=5))
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2))
    return tmp_path


def recipe(**changes: Any) -> dict[str, Any]:
    value = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "sql"}, {"adapter": "json"}]}
    return {**value, **changes}


def plan_of(root: Path, **changes: Any) -> Plan:
    return make_plan(parse_recipe(recipe(**changes)), Resolver(roots=[root]))


def problems_of(root: Path, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, **changes)
    return [(problem.code, problem.where) for problem in caught.value.problems]


def tensor(plan: Plan, name: str = Q) -> TensorPlan:
    return next(item for item in plan.tensors if item.name == name)


def test_a_plan_names_every_tensor_and_who_changes_it(root: Path) -> None:
    plan = plan_of(root)
    assert sorted(item.name for item in plan.tensors) == sorted(llama_tensors())
    touched = {item.name for item in plan.tensors if item.contributions}
    assert touched == {name for name in llama_tensors() if "_proj" in name}
    assert [item.source for item in tensor(plan).contributions] == [0, 1]
    assert plan.estimates.tensors_touched == 4
    assert plan.estimates.output_bytes == sum(value.nbytes for value in llama_tensors().values())


def test_defaults_are_mergekits(root: Path) -> None:
    parameters = tensor(plan_of(root)).parameters
    assert parameters["divisor"] == "agreeing_weights"
    assert (parameters["trim_scope"], parameters["min_keep"], parameters["elect"]) == ("tensor", 1, "mass")
    assert (parameters["weights"], parameters["zero_sum"], parameters["normalize"]) == ("vote", "plus", True)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("paper", {"trim_scope": "model", "weights": "scale", "divisor": "agreeing", "zero_sum": "majority"}),
        ("peft", {"trim_scope": "tensor", "weights": "merge", "divisor": "agreeing", "min_keep": 0}),
        ("article", {"elect": "unanimous", "weights": "scale", "divisor": "sources"}),
    ],
)
def test_a_dialect_is_resolved_into_single_choices(root: Path, dialect: str, expected: dict[str, Any]) -> None:
    parameters = tensor(plan_of(root, parameters={"dialect": dialect})).parameters
    assert {key: parameters[key] for key in expected} == expected


def test_a_single_choice_wins_over_its_dialect(root: Path) -> None:
    parameters = tensor(plan_of(root, parameters={"dialect": "paper", "trim_scope": "tensor"})).parameters
    assert (parameters["trim_scope"], parameters["weights"]) == ("tensor", "scale")


def test_a_sources_own_parameter_wins_and_gradients_follow_the_layers(root: Path) -> None:
    models = [{"adapter": "json", "parameters": {"density": [0.2, 0.8]}}, {"adapter": "sql"}]
    plan = plan_of(root, models=models, parameters={"density": 0.5})
    last = tensor(plan, Q.replace("layers.0", "layers.1"))
    assert [item.parameters["density"] for item in tensor(plan).contributions] == [0.2, 0.5]
    assert [item.parameters["density"] for item in last.contributions] == [0.8, 0.5]


def test_full_models_and_adapters_stand_side_by_side(root: Path) -> None:
    plan = plan_of(root, models=[{"model": "tuned"}, {"model": "base+sql"}, {"model": "tuned+json"}])
    assert [source.reference for source in plan.sources] == ["models:sql", "models:tuned", "models:tuned+models:json"]
    lora, full, both = tensor(plan).contributions
    assert full.full is not None and full.lora is None
    assert lora.full is None and lora.lora is not None
    assert both.full is not None and both.lora is not None
    assert [item.source for item in tensor(plan, "model.norm.weight").contributions] == [1, 2]


def test_the_base_among_models_is_no_source_for_task_vectors(root: Path) -> None:
    plan = plan_of(root, models=[{"model": "base"}, {"adapter": "sql"}])
    assert [source.reference for source in plan.sources] == ["models:sql"]


def test_the_base_counts_in_linear(root: Path) -> None:
    plan = plan_of(root, merge_method="linear", models=[{"model": "base"}, {"adapter": "sql"}])
    assert len(tensor(plan).contributions) == 2


def test_linear_without_a_base_takes_the_first_model(root: Path) -> None:
    plan = plan_of(root, merge_method="linear", base_model=None, models=[{"model": "base"}, {"model": "tuned"}])
    assert plan.base.reference == "models:base"
    assert len(tensor(plan).contributions) == 2


def test_untouched_sources_count_as_zero_in_task_arithmetic(root: Path) -> None:
    tensors = {name: value for name, value in lora_tensors(seed=2).items() if "mlp" in name}
    write_adapter(root / "json", tensors)
    assert len(tensor(plan_of(root)).contributions) == 1
    assert len(tensor(plan_of(root, merge_method="task_arithmetic")).contributions) == 2


def test_conv1d_is_decided_by_the_architecture_even_for_square_matrices(root: Path) -> None:
    base = {
        "transformer.h.0.attn.c_proj.weight": torch.zeros(8, 8),
        "transformer.h.0.mlp.c_fc.weight": torch.zeros(8, 16),
    }
    write_model(root / "gpt", base, model_type="gpt2")
    factors = {}
    for module, rows in (("attn.c_proj", 8), ("mlp.c_fc", 16)):
        factors[f"base_model.model.transformer.h.0.{module}.lora_A.weight"] = torch.zeros(2, 8)
        factors[f"base_model.model.transformer.h.0.{module}.lora_B.weight"] = torch.zeros(rows, 2)
    write_adapter(root / "gpt-lora", factors)
    plan = plan_of(root, base_model="gpt", models=[{"adapter": "gpt-lora"}])
    assert all(item.lora and item.lora.transposed for found in plan.tensors for item in found.contributions)


def test_shards_hold_every_tensor_once_in_the_bases_order(root: Path) -> None:
    whole = plan_of(root)
    plan = plan_of(root, output={"max_shard_size": 600})
    assert [shard.filename for shard in whole.shards] == ["model.safetensors"]
    assert len(plan.shards) > 2
    assert plan.shards[0].filename == f"model-00001-of-{len(plan.shards):05d}.safetensors"
    assert [item.name for item in plan.tensors] == [item.name for item in whole.tensors]


def test_out_dtype_is_in_the_tensors_and_the_config(root: Path) -> None:
    plan = plan_of(root, out_dtype="bfloat16")
    assert {item.dtype for item in plan.tensors} == {"BF16"}
    assert plan.documents["config.json"]["torch_dtype"] == "bfloat16"


def test_code_named_in_configs_is_not_written(root: Path) -> None:
    write_model(root / "base", auto_map={"AutoModel": "modeling.Evil"})
    (root / "base" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}, "a": 1}')
    (root / "base" / "tokenizer.json").write_text("{}")
    plan = plan_of(root)
    assert "auto_map" not in plan.documents["config.json"]
    assert plan.documents["tokenizer_config.json"] == {"a": 1}
    assert [file.path.name for file in plan.companions] == ["tokenizer.json"]


def test_the_resolved_recipe_gives_an_equal_plan(root: Path) -> None:
    models = [{"model": "tuned+json", "parameters": {"weight": [0.1, 1]}}, {"adapter": "sql"}]
    plan = plan_of(root, models=models, out_dtype="float16", parameters={"dialect": "peft", "density": 0.4})
    assert make_plan(parse_recipe(plan.recipe), Resolver(roots=[root])) == plan


def test_a_filter_that_misses_falls_back_in_the_resolved_recipe_too(root: Path) -> None:
    models = [{"adapter": "sql", "parameters": {"density": [{"filter": "mlp", "value": 0.1}]}}]
    plan = plan_of(root, models=models, parameters={"density": 0.4})
    assert tensor(plan).contributions[0].parameters["density"] == 0.4
    assert make_plan(parse_recipe(plan.recipe), Resolver(roots=[root])) == plan


def test_the_digest_is_of_what_decides_the_bytes(root: Path) -> None:
    digest = plan_of(root).digest
    assert plan_of(root, base_model="models:base/", name="a name", parameters={"int8_mask": True}).digest == digest
    assert plan_of(root, parameters={"density": 0.9}).digest != digest
    assert plan_of(root, models=[{"adapter": "json"}, {"adapter": "sql"}]).digest == digest  # the method is symmetric
    write_adapter(root / "sql", lora_tensors(seed=9))
    assert plan_of(root).digest != digest


def test_what_is_ignored_does_not_decide_the_order_of_sources(root: Path) -> None:
    """The resolved recipe leaves it out, so it would be another merge."""
    models = [
        {"adapter": "sql", "parameters": {"weight": 0.25}},
        {"adapter": "sql", "parameters": {"density": 0.5, "weight": 0.5}},
    ]
    plan = plan_of(root, merge_method="task_arithmetic", models=models)
    assert make_plan(parse_recipe(plan.recipe), Resolver(roots=[root])).digest == plan.digest
    assert plan_of(root, merge_method="task_arithmetic", models=models[::-1]).digest == plan.digest


def test_all_missing_sources_are_reported_at_once(root: Path) -> None:
    models = [{"adapter": "nope"}, {"model": "also/nope"}, {"adapter": "../x"}, {"adapter": "sql"}]
    assert problems_of(root, models=models) == [
        ("source_not_found", "models[0].adapter"),
        ("source_not_found", "models[1].model"),
        ("path_outside_roots", "models[2].adapter"),
    ]


def test_a_missing_base_has_its_place(root: Path) -> None:
    assert problems_of(root, base_model="nope") == [("source_not_found", "base_model")]


def test_an_adapter_of_another_width_is_refused(root: Path) -> None:
    wide = {name: torch.zeros(2, 16) if "lora_A" in name else value for name, value in lora_tensors().items()}
    write_adapter(root / "sql", wide)
    assert {code for code, _ in problems_of(root)} == {"adapter_shape"}


def test_unmatched_modules_show_both_sides(root: Path) -> None:
    write_adapter(root / "sql", lora_tensors(layers=3))
    with pytest.raises(MergeyardError, match=r"layers\.2\.self_attn.*the base has model\.embed_tokens") as caught:
        plan_of(root)
    assert caught.value.code == "adapter_mismatch"


def test_another_models_tensors_are_refused(root: Path) -> None:
    tensors = llama_tensors(seed=5)
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    tensors[Q] = torch.zeros(4, 4)
    write_model(root / "tuned", tensors)
    found = problems_of(root, models=[{"model": "tuned"}])
    assert found == [("model_mismatch", "models[0].model")] * 3


def test_half_of_a_tie_is_refused(root: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.model.embed_tokens.weight": torch.zeros(16, 8)}
    write_adapter(root / "sql", tensors, modules_to_save=["embed_tokens"])
    assert problems_of(root) == [("adapter_tied_head", "models[0].adapter")]
    write_adapter(root / "sql", tensors, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert tensor(plan_of(root), "model.embed_tokens.weight").contributions[0].full


LM_HEAD = {
    "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 8),
    "base_model.model.lm_head.lora_B.weight": torch.zeros(16, 2),
}


def test_a_head_stored_beside_its_embedding_is_still_tied(root: Path) -> None:
    write_model(root / "base", {**llama_tensors(), "lm_head.weight": torch.zeros(16, 8)}, tie_word_embeddings=True)
    write_adapter(root / "sql", LM_HEAD)
    assert problems_of(root) == [("adapter_tied_head", "models[0].adapter")]


def test_an_untied_head_takes_an_adapter(root: Path) -> None:
    write_model(root / "base", {**llama_tensors(), "lm_head.weight": torch.zeros(16, 8)}, tie_word_embeddings=False)
    write_adapter(root / "sql", LM_HEAD)
    assert tensor(plan_of(root, models=[{"adapter": "sql"}]), "lm_head.weight").contributions[0].lora


def test_a_tie_that_was_trained_as_one_is_merged_as_one(root: Path) -> None:
    embedding = torch.ones(16, 8)
    tensors = {
        "base_model.model.model.embed_tokens.weight": embedding,
        "base_model.model.lm_head.weight": embedding.clone(),
    }
    write_adapter(root / "sql", tensors, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    plan = plan_of(root, models=[{"adapter": "sql"}])
    assert [item.name for item in plan.tensors if item.contributions] == ["model.embed_tokens.weight"]


def test_a_tie_stored_twice_changes_twice(root: Path) -> None:
    write_model(root / "base", {**llama_tensors(), "lm_head.weight": torch.zeros(16, 8)}, tie_word_embeddings=True)
    key = "base_model.model.model.embed_tokens"
    rows = {f"{key}.token_adapter.trainable_tokens_delta": torch.ones(1, 8)}
    factors = {f"{key}.lora_embedding_A": torch.ones(2, 16), f"{key}.lora_embedding_B": torch.ones(8, 2)}
    write_adapter(root / "sql", rows, trainable_token_indices=[3])
    write_adapter(root / "json", factors, ensure_weight_tying=True)
    for name in ("sql", "json"):
        plan = plan_of(root, models=[{"adapter": name}])
        assert [item.name for item in plan.tensors if item.contributions] == ["lm_head.weight", f"{key[17:]}.weight"]


def test_a_classifier_has_no_head_to_tie(root: Path) -> None:
    """Its config says that embeddings are tied, as that of every BERT does."""
    write_model(root / "base", architectures=["BertForSequenceClassification"], tie_word_embeddings=True)
    key = "base_model.model.model.embed_tokens"
    factors = {f"{key}.lora_embedding_A": torch.ones(2, 16), f"{key}.lora_embedding_B": torch.ones(8, 2)}
    write_adapter(root / "sql", factors)
    assert plan_of(root, models=[{"adapter": "sql"}]).estimates.tensors_touched == 1


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_one_prefix_between_checkpoint_and_adapter_is_bridged(root: Path, prefix: str) -> None:
    other = "" if prefix else "transformer."
    write_model(root / "gpt", {f"{prefix}h.0.attn.c_proj.weight": torch.zeros(8, 8)}, model_type="gpt2")
    key = f"base_model.model.{other}h.0.attn.c_proj"
    write_adapter(root / "lora", {f"{key}.lora_A.weight": torch.zeros(2, 8), f"{key}.lora_B.weight": torch.zeros(8, 2)})
    plan = plan_of(root, base_model="gpt", models=[{"adapter": "lora"}])
    assert plan.estimates.tensors_touched == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_packed_weights_are_refused(root: Path, dtype: torch.dtype) -> None:
    write_model(root / "tuned", {**llama_tensors(), Q: torch.zeros(8, 8).to(dtype)})
    assert problems_of(root, models=[{"model": "tuned"}]) == [("model_quantized", "models[0].model")]


def test_an_index_that_names_a_lost_tensor_is_refused(root: Path) -> None:
    weight_map = dict.fromkeys([*llama_tensors(), "lost.weight"], "model.safetensors")
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert problems_of(root) == [("source_format", "base_model")]


def test_a_warning_stands_at_its_own_place(root: Path) -> None:
    write_model(root / "base", _name_or_path="org/one")
    write_adapter(root / "sql", base_model_name_or_path="org/two")
    warnings = plan_of(root, models=[{"model": "base"}, {"adapter": "json"}, {"adapter": "sql"}]).warnings
    assert [warning.where for warning in warnings] == ["models[2]"]


def test_what_changes_nothing_is_said_to(root: Path) -> None:
    models = [{"adapter": "sql", "parameters": {"density": 0.5}}]
    plan = plan_of(root, merge_method="task_arithmetic", models=models)
    assert [warning.where for warning in plan.warnings] == ["parameters.density"]
    assert plan.digest == plan_of(root, merge_method="task_arithmetic", models=[{"adapter": "sql"}]).digest


def test_a_pickled_base_is_refused(root: Path) -> None:
    (root / "base" / "model.safetensors").rename(root / "base" / "pytorch_model.bin")
    assert problems_of(root) == [("pickle_refused", "base_model")]


def test_a_missing_shard_is_named(root: Path) -> None:
    (root / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(MergeyardError, match=r"gone\.safetensors"):
        plan_of(root)


def test_a_quantised_base_is_refused(root: Path) -> None:
    write_model(root / "base", quantization_config={"bits": 4})
    assert problems_of(root) == [("model_quantized", "base_model")]


def test_a_whole_model_trim_needs_one_density(root: Path) -> None:
    models = [{"adapter": "sql", "parameters": {"density": [0.1, 1.0]}}, {"adapter": "json"}]
    found = problems_of(root, models=models, parameters={"trim_scope": "model"})
    assert found == [("parameter_invalid", "models[0].parameters.density")]


def test_weights_that_cancel_cannot_be_normalised(root: Path) -> None:
    models = [{"model": "base", "parameters": {"weight": 1}}, {"model": "tuned", "parameters": {"weight": -1}}]
    found = problems_of(root, merge_method="linear", models=models)
    assert found == [("parameter_invalid", "parameters.normalize")]


def test_subtracting_with_normalize_warns(root: Path) -> None:
    models = [{"adapter": "sql", "parameters": {"weight": -0.5}}, {"adapter": "json"}]
    assert "normalize: false" in plan_of(root, models=models).warnings[0].message
    assert not plan_of(root, models=models, parameters={"normalize": False}).warnings


def test_only_the_base_is_nothing_to_merge(root: Path) -> None:
    assert problems_of(root, models=[{"model": "base"}]) == [("no_sources", "models")]


def test_a_plan_reads_no_weights(root: Path) -> None:
    """The weights' bytes are holes: a file of the right length with its header alone is enough."""
    shutil.copytree(root / "base", root / "hollow")
    path = root / "hollow" / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header])
    with path.open("r+b") as stream:
        stream.truncate(len(content))
    assert plan_of(root, base_model="hollow").estimates == plan_of(root).estimates
