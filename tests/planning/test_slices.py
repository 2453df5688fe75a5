"""Slices and modules: which tensor of which model each tensor of the result comes from."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.planning.modules import modules_of, stacks_of
from app.planning.plan import Plan, TensorPlan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import llama_tensors, write_adapter, write_model

Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "a", llama_tensors(4), num_hidden_layers=4, layer_types=["full", "slide", "full", "slide"])
    write_model(tmp_path / "b", llama_tensors(3, seed=5), num_hidden_layers=3, layer_types=["x", "y", "z"])
    write_adapter(tmp_path / "sql")
    return tmp_path


def plan_of(root: Path, slices: list[Any], **changes: Any) -> Plan:
    value = {"merge_method": "passthrough", "slices": slices, **changes}
    plan = make_plan(parse_recipe(value), Resolver(roots=[root]))
    again = make_plan(parse_recipe(plan.recipe), Resolver(roots=[root]))
    assert (again.digest, again.shards) == (plan.digest, plan.shards)
    return plan


def taken(model: str, first: int, stop: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, stop], **more}


def problems_of(root: Path, slices: list[Any], **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, slices, **changes)
    return [(problem.code, problem.where) for problem in caught.value.problems]


def tensor(plan: Plan, name: str) -> TensorPlan:
    return next(item for item in plan.tensors if item.name == name)


def origin(plan: Plan, name: str) -> tuple[str, str]:
    base = tensor(plan, name).base
    return plan.owner(base).removeprefix("models:"), base.name


def test_layers_are_stacked_in_order_and_may_repeat(root: Path) -> None:
    plan = plan_of(
        root, [{"sources": [taken("a", 0, 3)]}, {"sources": [taken("b", 1, 3)]}, {"sources": [taken("b", 1, 3)]}]
    )
    found = [origin(plan, Q.format(layer)) for layer in range(7)]
    assert found == [("a", Q.format(layer)) for layer in (0, 1, 2)] + [("b", Q.format(layer)) for layer in (1, 2, 1, 2)]
    assert len(plan.tensors) == 7 * 2 + 2
    assert plan.warnings == ()  # nothing is merged, and the result is no model that went in


def test_a_stack_that_is_its_own_model_again_is_warned_of(root: Path) -> None:
    (warning,) = plan_of(root, [{"sources": [taken("a", 0, 4)]}]).warnings
    assert (warning.code, warning.message) == ("no_sources", "No source changes any tensor; the result is the base.")


def test_embeddings_are_the_first_slices_and_the_norm_the_lasts(root: Path) -> None:
    plan = plan_of(root, [{"sources": [taken("a", 0, 1)]}, {"sources": [taken("b", 0, 1)]}])
    assert origin(plan, "model.embed_tokens.weight")[0] == "a"
    assert origin(plan, "model.norm.weight")[0] == "b"


def test_the_config_counts_the_layers_and_says_what_each_is(root: Path) -> None:
    plan = plan_of(root, [{"sources": [taken("a", 1, 3)]}, {"sources": [taken("b", 2, 3)]}])
    config = plan.documents["config.json"]
    assert (config["num_hidden_layers"], config["layer_types"]) == (3, ["slide", "full", "z"])


def test_gradients_run_over_each_slice_and_filters_see_the_sources_names(root: Path) -> None:
    weight = {"weight": [{"filter": "layers.2.", "value": 7.0}, {"value": [0.0, 1.0]}]}
    slices = [{"sources": [taken("a", 0, 2), taken("b", 1, 3, parameters=weight)]}]
    plan = plan_of(root, slices, merge_method="linear", parameters={"normalize": False, "weight": 3.0})
    by_layer = [[item.parameters["weight"] for item in tensor(plan, Q.format(layer)).contributions] for layer in (0, 1)]
    assert by_layer == [[3.0, 0.0], [3.0, 7.0]]


def test_a_slice_of_task_vectors_changes_the_layers_that_the_base_names(root: Path) -> None:
    slices = [{"sources": [taken("a", 2, 4), taken("b", 0, 2)]}, {"sources": [taken("a", 0, 1), taken("b", 2, 3)]}]
    plan = plan_of(root, slices, merge_method="task_arithmetic", base_model="a")
    assert origin(plan, Q.format(0)) == ("a", Q.format(2))
    (change,) = tensor(plan, Q.format(2)).contributions
    assert (change.full.name if change.full else None) == Q.format(2)
    assert [source.reference for source in plan.sources] == ["models:b"]


def test_a_slice_may_have_a_base_of_its_own(root: Path) -> None:
    slices = [{"sources": [taken("a", 0, 2), taken("b", 0, 2)], "base_model": "b"}]
    plan = plan_of(root, slices, merge_method="ties", base_model="a")
    assert origin(plan, Q.format(0)) == ("b", Q.format(0))
    assert [source.reference for source in plan.sources] == ["models:a", "models:b"]


def test_an_adapter_in_a_slice_sits_on_its_models_own_layers(root: Path) -> None:
    plan = plan_of(root, [{"sources": [taken("a", 2, 4)]}, {"sources": [taken("a+sql", 0, 2)]}])
    assert not tensor(plan, Q.format(0)).contributions
    lora = tensor(plan, Q.format(2)).contributions[0].lora
    assert lora is not None and "layers.0." in lora.A.name


def test_an_adapter_alone_in_a_slice_is_the_base_with_it(root: Path) -> None:
    slices = [{"sources": [{"adapter": "sql", "layer_range": [0, 2]}]}]
    named = plan_of(root, slices, base_model="a")
    assert named.digest == plan_of(root, [{"sources": [taken("a+sql", 0, 2)]}], base_model="a").digest


def test_the_order_of_a_slices_sources_means_nothing_in_symmetric_methods(root: Path) -> None:
    one, two = taken("a", 0, 2), taken("b", 1, 3)
    digests = {plan_of(root, [{"sources": item}], merge_method="linear").digest for item in ([one, two], [two, one])}
    assert len(digests) == 1


def test_the_base_of_a_slice_is_listed_once(root: Path) -> None:
    slices = [{"sources": [taken("a", 0, 1), taken("a", 1, 2), taken("b", 0, 1)]}]
    assert problems_of(root, slices, merge_method="ties", base_model="a") == [("recipe_invalid", "slices[0].sources")]


def test_everything_wrong_with_slices_is_said_at_once(root: Path) -> None:
    write_model(root / "wide", {name: torch.zeros(*value.shape, 2) for name, value in llama_tensors(4).items()})
    slices = [
        {"sources": [taken("a", 3, 5)]},
        {"sources": [taken("none", 0, 1)]},
    ]
    assert problems_of(root, slices) == [("source_not_found", "slices[1].sources[0].model")]
    slices[1] = {"sources": [taken("b", 2, 4)]}
    places = ["slices[0].sources[0].layer_range", "slices[1].sources[0].layer_range"]
    found = problems_of(root, slices)
    assert [code for code, _ in found] == ["recipe_invalid"] * len(found)
    assert set(places) <= {where for _, where in found}
    mixed = [{"sources": [taken("a", 0, 1)]}, {"sources": [taken("wide", 0, 1)]}]
    assert problems_of(root, mixed)[0][0] == "model_mismatch"
    together = [{"sources": [taken("a", 0, 1), taken("wide", 0, 1)]}]
    assert problems_of(root, together, merge_method="linear")[0] == ("model_mismatch", "slices[0].sources[1]")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"slices": [{"sources": []}]}, ("recipe_invalid", "slices[0].sources")),
        ({"slices": [{"sources": [taken("a", 2, 2)]}]}, ("recipe_invalid", "slices[0].sources[0].layer_range")),
        ({"slices": [{"sources": [taken("a", -1, 2)]}]}, ("recipe_invalid", "slices[0].sources[0].layer_range")),
        ({"slices": [{"sources": [{"model": "a"}]}]}, ("recipe_invalid", "slices[0].sources[0].layer_range")),
        (
            {"slices": [{"sources": [taken("a", 0, 2), taken("b", 0, 1)]}]},
            ("recipe_invalid", "slices[0].sources"),
        ),
        (
            {"slices": [{"sources": [taken("a", 0, 2)], "residual_weight": 0.5}]},
            ("not_supported", "slices[0].residual_weight"),
        ),
        ({"slices": [{"sources": [taken("a", 0, 2)]}], "models": [{"model": "a"}]}, ("recipe_invalid", "slices")),
        ({"modules": {"default": {}}}, ("no_sources", "modules.default")),
        ({"modules": {"text": {"models": [{"model": "a"}]}}}, ("module_unknown", "modules.text")),
    ],
)
def test_slices_that_cannot_be_meant_are_refused(root: Path, changes: Any, expected: tuple[str, str]) -> None:
    assert problems_of(root, changes.pop("slices", []), **changes)[0] == expected


# ── modules ─────────────────────────────────────────────────────────────────────────────────────

T5 = [
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.final_layer_norm.weight",
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.block.1.layer.0.SelfAttention.q.weight",
    "lm_head.weight",
]
GEMMA = [
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    "model.multi_modal_projector.mm_soft_emb_norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.x", "lm_head.weight"], [("default",)]),
        (T5, [("shared", "encoder", "decoder"), ("default", "encoder.block", "decoder.block")]),
        (GEMMA, [("text_decoder", "vision_tower", "multi_modal_projector")]),
    ],
)
def test_modules_have_the_names_that_mergekit_has_for_them(names: list[str], expected: list[tuple[str, ...]]) -> None:
    found = [way.names for way in modules_of(names)]
    assert all(way in found for way in expected)


def test_t5_has_two_stacks() -> None:
    assert stacks_of(T5) == {"encoder.block": 1, "decoder.block": 2}


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    for seed, name in enumerate(("t", "u")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(4, 4, generator=generator) for key in T5}
        write_model(tmp_path / name, tensors, model_type="t5", num_layers=1, num_decoder_layers=2)
    return tmp_path


def test_modules_are_merged_each_from_its_own_and_the_rest_is_the_bases(t5: Path) -> None:
    modules = {
        "encoder": {"models": [{"model": "t"}]},
        "decoder": {"slices": [{"sources": [taken("u", 0, 2)]}, {"sources": [taken("t", 1, 2)]}]},
    }
    plan = plan_of(t5, [], modules=modules, base_model="t")
    assert origin(plan, "decoder.block.1.layer.0.SelfAttention.q.weight") == ("u", T5[4])
    assert origin(plan, "decoder.block.2.layer.0.SelfAttention.q.weight") == ("t", T5[4])
    assert origin(plan, "shared.weight")[0] == "t"
    assert plan.documents["config.json"]["num_decoder_layers"] == 3
    assert plan.documents["config.json"]["num_layers"] == 1


LEVELS = ("source", "slice", "module", "recipe")


@pytest.mark.parametrize("kind", ["scalar", "gradient", "filter", "filters of which none matches"])
@pytest.mark.parametrize("given", [some for count in range(1, 5) for some in combinations(LEVELS, count)], ids=" ".join)
def test_the_most_specific_level_that_says_something_wins(root: Path, given: tuple[str, ...], kind: str) -> None:
    """Every choice of levels: the winner is the first of ``LEVELS`` among them, whatever form the values have."""

    def value(level: str) -> Any:
        number = 2.0 + LEVELS.index(level)
        first = next(item for item in LEVELS if item in given)
        if kind == "filters of which none matches" and level == first:
            return [{"filter": "no such tensor", "value": 99.0}]
        return {
            "gradient": [number, 50.0],
            "filter": [{"filter": "q_proj", "value": number}, {"value": 60.0}],
        }.get(kind, number)

    own = {level: {"parameters": {"weight": value(level)}} if level in given else {} for level in LEVELS}
    slices = [{"sources": [taken("a", 0, 3), taken("b", 0, 3, **own["source"])], **own["slice"]}]
    changes = {"merge_method": "task_arithmetic", "base_model": "a", **own["recipe"]}
    plan = plan_of(root, [], modules={"default": {"slices": slices, **own["module"]}}, **changes)
    said = [level for level in LEVELS if level in given]
    if kind == "filters of which none matches":
        said = said[1:]  # the first says nothing about this tensor
    expected = 2.0 + LEVELS.index(said[0]) if said else 1.0
    (contribution,) = tensor(plan, Q.format(0)).contributions
    assert contribution.parameters["weight"] == expected


def test_slices_of_several_stacks_need_modules(t5: Path) -> None:
    assert problems_of(t5, [{"sources": [taken("t", 0, 1)]}]) == [("recipe_invalid", "slices")]


def test_gradients_run_over_each_stack(t5: Path) -> None:
    models = [{"model": "u", "parameters": {"weight": [0.0, 1.0]}}]
    value = {"merge_method": "task_arithmetic", "base_model": "t", "models": models}
    plan = make_plan(parse_recipe(value), Resolver(roots=[t5]))
    weights = [tensor(plan, name).contributions[0].parameters["weight"] for name in (T5[1], T5[3], T5[4])]
    assert weights == [1.0, 0.0, 1.0]
