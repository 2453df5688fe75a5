"""Several documents in one recipe: which is the result, what each reads, and everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from app.errors import MergeyardError, Problem
from app.planning.plan import Plan
from app.planning.planner import MAX_MADE, make_plan
from app.recipe import parse_recipe
from app.recipe.text import MAX_DOCUMENTS
from app.sources.resolver import Resolver
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model
from tests.words import USER, tokenizer, write_speaker

LEFT = {"name": "left", "base_model": "base", "merge_method": "task_arithmetic", "models": [{"model": "tuned"}]}
RIGHT = {"name": "right", "base_model": "left", "merge_method": "task_arithmetic", "models": [{"model": "other"}]}
RESULT = {"base_model": "base", "merge_method": "ties", "models": [{"model": "left"}, {"model": "right"}]}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "tuned", "other")):
        write_model(tmp_path / name, llama_tensors(seed=seed, dtype=torch.bfloat16))
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2))
    return tmp_path


def plan_of(root: Path, *documents: dict[str, Any]) -> Plan:
    return make_plan(parse_recipe({"documents": list(documents)}), Resolver(roots=[root]))


def problems_of(root: Path, *documents: Any) -> Sequence[Problem]:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, *documents)
    return caught.value.problems


def test_documents_in_yaml_and_in_json_are_one_recipe(root: Path) -> None:
    text = "---\n".join(yaml.safe_dump(document) for document in (LEFT, RIGHT, RESULT))
    resolver = Resolver(roots=[root])
    plan = plan_of(root, LEFT, RIGHT, RESULT)
    assert make_plan(parse_recipe(text), resolver) == plan
    assert make_plan(parse_recipe(json.dumps({"documents": [LEFT, RIGHT, RESULT]})), resolver) == plan


def test_a_recipe_is_shown_as_it_was_sent() -> None:
    sent = {"documents": [RIGHT, RESULT, LEFT]}
    assert parse_recipe(sent).as_sent() == sent


def test_each_document_is_planned_after_those_that_it_names(root: Path) -> None:
    plan = plan_of(root, RESULT, RIGHT, LEFT)  # mergekit-multi sorts them too
    assert [document.reference for document in plan.earlier] == ["left", "right"]
    assert plan.earlier[1].base.reference == "left"
    assert plan == plan_of(root, LEFT, RIGHT, RESULT)


def test_the_last_document_is_the_result_where_all_have_names(root: Path) -> None:
    plan = plan_of(root, LEFT, RIGHT, {**RESULT, "name": "done"})
    assert plan.method == "ties" and len(plan.earlier) == 2


def test_the_resolved_recipe_gives_an_equal_plan(root: Path) -> None:
    plan = plan_of(root, LEFT, RIGHT, {**RESULT, "base_model": "base+sql"})
    assert [document.get("name") for document in plan.recipe["documents"]] == ["left", "right", None]
    assert make_plan(parse_recipe(json.loads(json.dumps(plan.recipe))), Resolver(roots=[root])) == plan


def test_the_digest_is_of_all_documents(root: Path) -> None:
    plan = plan_of(root, LEFT, RIGHT, RESULT)
    weaker = {**LEFT, "parameters": {"weight": 0.5}}
    assert plan_of(root, weaker, RIGHT, RESULT).digest != plan.digest
    write_model(root / "tuned", llama_tensors(seed=7, dtype=torch.bfloat16))
    assert plan_of(root, LEFT, RIGHT, RESULT).digest != plan.digest


@pytest.mark.parametrize("result", [{"base_model": "tall"}, {"base_model": "tall+sql"}, {"base_model": "taller"}])
def test_the_digest_is_of_documents_that_change_no_value(result: dict[str, Any], root: Path) -> None:
    def digest(*layers: int) -> str:
        slices = [{"sources": [{"model": "tuned", "layer_range": [layer, layer + 1]}]} for layer in layers]
        tall = {"name": "tall", "merge_method": "passthrough", "slices": slices}
        taller = {**tall, "name": "taller", "slices": [{"sources": [{"model": "tall", "layer_range": [0, 2]}]}]}
        merge = {"merge_method": "task_arithmetic", "models": [{"model": "base"}], **result}
        return plan_of(root, tall, *([taller] if result["base_model"] == "taller" else []), merge).digest

    assert len({digest(0, 1), digest(1, 0), digest(0, 0)}) == 3


def test_a_document_wins_over_a_model_of_its_name(root: Path) -> None:
    write_model(root / "left", llama_tensors(seed=9))
    plan = plan_of(root, LEFT, {**RESULT, "models": [{"model": "left"}, {"model": "models:left"}]})
    assert [source.reference for source in plan.sources] == ["left", "models:left"]
    assert [[file.name for file in source.files] for source in plan.sources] == [
        ["left/model.safetensors"],
        ["model.safetensors"],
    ]


def test_a_folder_of_a_document_s_name_has_another(root: Path) -> None:
    write_model(root / "left", llama_tensors(seed=9))
    lists = {**LEFT, "models": [{"model": "./left"}]}
    recipe = {"documents": [lists, {**RESULT, "models": [{"model": "left"}, {"model": "./left"}]}]}
    resolver = Resolver(local=root)
    plan = make_plan(parse_recipe(recipe), resolver)
    folder = str((root / "left").resolve())
    assert [source.reference for source in plan.earlier[0].sources] == [folder]
    assert sorted(source.reference for source in plan.sources) == sorted([folder, "left"])
    assert make_plan(parse_recipe(plan.recipe), resolver) == plan


def test_what_a_document_leaves_as_it_is_is_not_written(root: Path) -> None:
    adapted = {**LEFT, "models": [{"adapter": "sql"}]}
    plan = plan_of(root, adapted, {**RESULT, "models": [{"model": "left"}]})
    touched = {tensor.name for tensor in plan.tensors if tensor.contributions}
    assert (
        {tensor.name for tensor in plan.earlier[0].tensors} == touched == {n for n in llama_tensors() if "_proj" in n}
    )


def test_estimates_count_what_earlier_documents_write(root: Path) -> None:
    plan = plan_of(root, LEFT, RIGHT, RESULT)
    values = sum(value.numel() for value in llama_tensors().values())
    assert plan.estimates.output_bytes == 2 * values
    assert plan.estimates.scratch_bytes == 2 * 4 * values, "in float32"
    assert plan.estimates.disk_bytes == 10 * values


@pytest.mark.parametrize(
    ("left", "stored", "result"),
    [
        ({}, "F32", "BF16"),
        ({"out_dtype": "float32"}, "F32", "F32"),
        ({"dtype": "float16"}, "F16", "F16"),
    ],
)
def test_a_document_is_rounded_only_where_it_names_a_type(
    root: Path, left: dict[str, str], stored: str, result: str
) -> None:
    """And the result has the type it would have with a model in the document's place."""
    plan = plan_of(root, {**LEFT, **left}, RIGHT)
    assert {tensor.dtype for tensor in plan.earlier[0].tensors} == {stored}
    assert {tensor.dtype for tensor in plan.tensors} == {result}
    assert plan_of(root, {**LEFT, **left}, {**RIGHT, "out_dtype": "float16"}).tensors[0].dtype == "F16"


def test_the_type_passes_through_slices_modules_and_vocabularies(root: Path) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        write_speaker(root / name, tokenizer(), seed=seed, dtype=torch.bfloat16)
    layers = [{"model": "left", "layer_range": [0, 1]}]
    for changes in (
        {"merge_method": "passthrough", "slices": [{"sources": layers}]},
        {"modules": {"default": {"models": [{"model": "tuned"}]}}},
        {"models": [{"model": "tuned"}], "tokenizer": {"source": "left", "pad_to_multiple_of": 64}},
    ):
        plan = plan_of(root, LEFT, {"base_model": "left", "merge_method": "task_arithmetic", **changes})
        assert {tensor.dtype for tensor in plan.tensors} == {"BF16"}, changes


class TestABaseWithAnAdapter:
    def test_is_the_adapter_merged_into_it(self, root: Path) -> None:
        plan = plan_of(root, {**RESULT, "base_model": "base+sql", "models": [{"model": "tuned"}, {"adapter": "json"}]})
        (base,) = plan.earlier
        assert (plan.base.reference, base.method, base.reference) == (
            "models:base+models:sql",
            "task_arithmetic",
            "models:base+models:sql",
        )
        assert [source.reference for source in plan.sources] == ["models:json", "models:tuned"]

    def test_may_be_listed_as_itself(self, root: Path) -> None:
        models = [{"model": "models:base+sql"}, {"model": "tuned"}]
        plan = plan_of(root, {**RESULT, "base_model": "base+sql", "models": models})
        assert [source.reference for source in plan.sources] == ["models:tuned"]

    def test_is_made_once_for_all_that_name_it(self, root: Path) -> None:
        left, right = ({**LEFT, "name": name, "base_model": "base+sql"} for name in ("left", "right"))
        plan = plan_of(root, left, right, {**RESULT, "base_model": "models:base+models:sql"})
        assert [document.reference for document in plan.earlier] == ["models:base+models:sql", "left", "right"]

    def test_may_be_the_base_of_a_slice(self, root: Path) -> None:
        sources = [{"model": "tuned", "layer_range": [0, 2]}]
        slices = [{"base_model": "other+sql", "sources": sources}]
        plan = plan_of(root, {"merge_method": "task_arithmetic", "slices": slices})
        assert plan.base.reference == "models:other+models:sql"
        with_it = [{"model": "other+sql", "layer_range": [0, 2]}, *sources]
        assert (
            plan_of(
                root, {"merge_method": "task_arithmetic", "slices": [{"base_model": "other+sql", "sources": with_it}]}
            ).sources
            == plan.sources
        ), "listed, it is no source"

    def test_may_have_several(self, root: Path) -> None:
        plan = plan_of(root, {**RESULT, "base_model": "base+sql+json", "models": [{"model": "base+sql"}]})
        assert [document.reference for document in plan.earlier] == [
            "models:base+models:sql",
            "models:base+models:sql+models:json",
        ]
        assert plan_of(root, {**RESULT, "base_model": "base+sql", "models": [{"model": "base+sql+json"}]}).sources

    def test_has_no_more_adapters_than_anybody_means(self, root: Path) -> None:
        (problem,) = problems_of(root, {**RESULT, "base_model": "base" + "+sql" * 9})
        assert (problem.code, problem.where) == ("recipe_invalid", "documents[0].base_model")

    def test_is_not_made_without_end(self, root: Path) -> None:
        for number in range(MAX_MADE + 1):
            write_adapter(root / f"a{number}")
        models = [{"model": f"base+a{number}+sql"} for number in range(MAX_MADE + 1)]
        (problem,) = problems_of(root, {**RESULT, "models": models})
        assert (problem.code, problem.where) == ("recipe_invalid", f"documents[0].models[{MAX_MADE}].model")

    def test_may_be_a_document(self, root: Path) -> None:
        plan = plan_of(root, LEFT, {**RESULT, "base_model": "left+sql", "models": [{"model": "tuned"}]})
        assert [document.reference for document in plan.earlier] == ["left", "left+models:sql"]

    def test_lends_its_tokenizer_as_any_base(self, root: Path) -> None:
        write_speaker(root / "speaker", tokenizer())
        write_adapter(root / "norm", {"base_model.model.model.norm.weight": torch.ones(16)}, modules_to_save=["norm"])
        write_speaker(root / "chat", tokenizer(extra=[USER]), seed=1)
        tokens = {USER: {"source": {"kind": "model_token", "model": "speaker+norm", "token_id": 3}}}
        document = {"base_model": "speaker+norm", "merge_method": "linear", "models": [{"model": "chat"}]}
        plan = plan_of(root, {**document, "tokenizer": {"source": "speaker+norm", "tokens": tokens}})
        assert plan.recipe["tokenizer"]["source"] == plan.base.reference == "models:speaker+models:norm"
        assert make_plan(parse_recipe(plan.recipe), Resolver(roots=[root])) == plan

    def test_has_its_problems_where_it_is_named(self, root: Path) -> None:
        write_adapter(root / "wide", {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in lora_tensors().items()})
        for adapter, code in {
            "wide": "adapter_shape",
            "nowhere": "source_not_found",
            "tuned": "source_not_found",
        }.items():
            problem, *_ = problems_of(root, LEFT, {**RESULT, "base_model": f"left+{adapter}"})
            assert (problem.code, problem.where) == (code, "documents[1].base_model"), adapter

    def test_cannot_be_the_base_of_an_adapter(self, root: Path) -> None:
        document = {**RESULT, "base_model": "base+sql", "models": [{"adapter": "json"}], "output": {"kind": "adapter"}}
        (problem,) = problems_of(root, document)
        assert (problem.code, problem.where) == ("not_supported", "documents[0].output.kind")


@pytest.mark.parametrize(
    ("documents", "code", "where"),
    [
        ([], "recipe_invalid", "documents"),
        ([LEFT] * (MAX_DOCUMENTS + 1), "recipe_invalid", "documents"),
        ([LEFT, None, RESULT], "recipe_invalid", "documents[1]"),
        ([LEFT, "left", RESULT], "recipe_invalid", "documents[1]"),
        ([LEFT, LEFT, RESULT], "recipe_invalid", "documents[1].name"),
        ([{**LEFT, "name": None}, RIGHT, RESULT], "recipe_invalid", "documents[2].name"),
        ([{**LEFT, "name": ""}, RESULT], "recipe_invalid", "documents[0].name"),
        ([{**LEFT, "name": "models:base"}, RESULT], "recipe_invalid", "documents[0].name"),
        ([{**LEFT, "name": "base+sql"}, RESULT], "recipe_invalid", "documents[0].name"),
        ([{**LEFT, "base_model": "right"}, RIGHT, RESULT], "recipe_invalid", "documents[0]"),
        ([{**LEFT, "models": [{"model": "left"}]}, RESULT], "recipe_invalid", "documents[0]"),
        ([LEFT, RIGHT, {**RESULT, "models": [{"model": "left"}]}], "recipe_invalid", "documents[1]"),
        ([{**LEFT, "output": {"kind": "adapter"}}, RESULT], "not_supported", "documents[0].output.kind"),
        ([{**LEFT, "weights": 1}, RIGHT, RESULT], "unknown_key", "documents[0].weights"),
        ([LEFT, RIGHT, {**RESULT, "documents": [LEFT]}], "unknown_key", "documents[2].documents"),
        ([LEFT, RIGHT, {**RESULT, "earlier": [LEFT]}], "unknown_key", "documents[2].earlier"),
        ([LEFT, {**RIGHT, "merge_method": "tiez"}, RESULT], "unknown_method", "documents[1].merge_method"),
        ([LEFT, {**RIGHT, "base_model": "middle"}, RESULT], "source_not_found", "documents[1].base_model"),
        ([LEFT, {**RESULT, "models": [{"adapter": "left"}]}], "reference_invalid", "documents[1].models[0].adapter"),
        ([LEFT, RIGHT, {**RESULT, "parameters": {"x": 2}}], "unknown_key", "documents[2].parameters.x"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_code_and_says_in_which_document(
    root: Path, documents: list[Any], code: str, where: str
) -> None:
    problem, *_ = problems_of(root, *documents)
    assert (problem.code, problem.where) == (code, where), problem


def test_keys_beside_the_documents_are_refused(root: Path) -> None:
    with pytest.raises(MergeyardError) as caught:
        parse_recipe({"documents": [LEFT, RIGHT, RESULT], "out_dtype": "float32"})
    assert (caught.value.code, caught.value.where) == ("unknown_key", "out_dtype")


def test_each_document_may_have_a_long_chat_template() -> None:
    template = "{{ messages }}" * 1000
    recipe = parse_recipe(
        {"documents": [{**LEFT, "chat_template": template}, {**RESULT, "models": [{"model": "left"}]}]}
    )
    assert recipe.earlier[0].chat_template == template


def test_the_documents_of_a_circle_are_named(root: Path) -> None:
    problem, *_ = problems_of(root, {**LEFT, "base_model": "right"}, RIGHT, RESULT)
    assert "left ← right ← left" in problem.message


def test_documents_that_all_need_each_other_are_told_so_in_no_time(root: Path) -> None:
    """Paths through such a graph are more than there is time for."""
    names = [f"d{number}" for number in range(MAX_DOCUMENTS - 1)]
    documents = [
        {**LEFT, "name": name, "models": [{"model": other} for other in ("tuned", *names[:number])]}
        for number, name in enumerate(names)
    ]
    result = {**RESULT, "models": [{"model": name} for name in names]}
    assert len(parse_recipe({"documents": [*documents, result]}).earlier) == len(names)


def test_a_name_that_is_neither_a_document_nor_a_model_is_told_the_documents(root: Path) -> None:
    problem, *_ = problems_of(root, LEFT, {**RESULT, "models": [{"model": "left"}, {"model": "lift"}]})
    assert problem.where == "documents[1].models[1].model"
    assert "the documents before it are left" in problem.message


def test_problems_of_all_documents_come_at_once_and_no_more_than_there_are(root: Path) -> None:
    lost = {**LEFT, "models": [{"model": "nowhere"}]}
    also = {**LEFT, "name": "also", "base_model": "nowhere"}
    found = problems_of(root, lost, RIGHT, also, {**RESULT, "models": [{"model": "right"}, {"model": "also"}]})
    assert [problem.where for problem in found] == ["documents[2].base_model", "documents[0].models[0].model"]
    found = problems_of(root, lost, RIGHT, {**RESULT, "models": [{"model": "right"}]})
    assert [problem.where for problem in found] == ["documents[0].models[0].model"]


def test_warnings_say_in_which_document(root: Path) -> None:
    subtracting = {**LEFT, "merge_method": "ties", "parameters": {"weight": -1}}
    (warning,) = plan_of(root, subtracting, {**RESULT, "models": [{"model": "left"}]}).warnings
    assert warning.where == "documents[0].parameters.normalize"
