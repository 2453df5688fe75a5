"""What each method takes: how many sources, which parameters, and what becomes of tensors that nobody changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.recipe.methods import METHODS
from tests.engine.merges import merge, plan_of, tensors_of
from tests.files import write_adapter, write_model

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"  # no adapter changes it


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    for name in ("sql", "json", "style"):
        write_adapter(tmp_path / name)
    return tmp_path


def planned(root: Path, method: str, adapters: list[str], **parameters: Any) -> Plan:
    models = [{"adapter": name} for name in adapters]
    recipe = {"base_model": "base", "merge_method": method, "models": models, "parameters": parameters}
    return plan_of(root, recipe)


def refusal(root: Path, method: str, adapters: list[str], **parameters: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(MergeyardError) as caught:
        planned(root, method, adapters, **parameters)
    return [(problem.code, problem.where, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("method", "adapters", "amount"),
    [
        ("slerp", ["sql", "json"], "exactly 1 source beside the base; here are 2."),
        ("nearswap", ["sql", "json"], "exactly 1 source beside the base; here are 2."),
        ("arcee_fusion", ["sql", "json"], "exactly 1 source beside the base; here are 2."),
        ("passthrough", ["sql", "json"], "exactly 1 source; here are 2."),
        ("nuslerp", ["sql"], "exactly 2 sources; here are 1."),
        ("nuslerp", ["sql", "json", "style"], "exactly 2 sources; here are 3."),
        ("model_stock", ["sql"], "at least 2 sources beside the base; here are 1."),
    ],
)
def test_too_few_or_too_many_sources_are_one_problem(method: str, adapters: list[str], amount: str, root: Path) -> None:
    given = {"t": 0.5} if "t" in METHODS[method].parameters else {}
    assert refusal(root, method, adapters, **given) == [("recipe_invalid", "models", f"{method} merges {amount}")]


@pytest.mark.parametrize("method", ["slerp", "nearswap"])
def test_a_parameter_without_a_default_must_be_given(method: str, root: Path) -> None:
    [(code, where, message)] = refusal(root, method, ["sql"])
    assert (code, where) == ("parameter_invalid", "parameters.t")
    assert f"{method} needs `t`" in message


def test_a_filter_that_leaves_a_tensor_without_a_value_is_refused(root: Path) -> None:
    [(code, where, message)] = refusal(root, "slerp", ["sql"], t=[{"filter": "self_attn", "value": 0.5}])
    assert (code, where) == ("parameter_invalid", "parameters.t")
    assert "model.embed_tokens.weight" in message


@pytest.mark.parametrize("seed", [0.5, -1, True, [1, 2], "1", 2**63])
def test_a_seed_is_one_whole_number(seed: Any, root: Path) -> None:
    [(code, where, message)] = refusal(root, "dare_ties", ["sql"], seed=seed)
    assert (code, where) == ("parameter_invalid", "parameters.seed")
    assert "whole number" in message


@pytest.mark.parametrize(("method", "flag"), [("linear", "normalize"), ("multislerp", "normalize_weights")])
def test_weights_that_sum_to_zero_cannot_be_normalised(method: str, flag: str, root: Path) -> None:
    models = [{"adapter": "sql", "parameters": {"weight": 1}}, {"adapter": "json", "parameters": {"weight": -1}}]
    with pytest.raises(MergeyardError) as caught:
        plan_of(root, {"base_model": "base", "merge_method": method, "models": models})
    assert [(item.code, item.where) for item in caught.value.problems] == [("parameter_invalid", f"parameters.{flag}")]
    plan_of(root, {"base_model": "base", "merge_method": method, "models": models, "parameters": {flag: False}})


def test_what_nobody_changes_is_copied(root: Path) -> None:
    for method, spec in METHODS.items():
        given = {"t": 0.5} if "t" in spec.parameters else {}
        adapters = ["sql", "json"][: spec.most]
        plan = planned(root, method, adapters, **given)
        untouched = {tensor.name for tensor in plan.tensors if not tensor.contributions}
        assert untouched == {"model.embed_tokens.weight", NORM}, method


def test_passthrough_scales_what_its_source_leaves_as_it_is(root: Path) -> None:
    merge(planned(root, "passthrough", ["sql"], scale=0.5), root / "out")
    assert torch.equal(tensors_of(root / "out")[NORM], tensors_of(root / "base")[NORM] * 0.5)


def test_models_that_are_merged_without_a_base_and_not_normalised_scale_it(root: Path) -> None:
    for name in ("x0", "x1"):
        write_model(root / name)  # both equal the base
    models = [{"model": "x0"}, {"model": "x1"}]
    recipe = {"merge_method": "multislerp", "models": models, "parameters": {"normalize_weights": False}}
    merge(plan_of(root, recipe), root / "out")
    torch.testing.assert_close(tensors_of(root / "out")[Q], 2 * tensors_of(root / "base")[Q])


@pytest.mark.parametrize("named", [True, False])
def test_the_base_among_the_models_is_a_source_unless_it_is_what_they_are_merged_around(
    named: bool, root: Path
) -> None:
    write_model(root / "tuned")
    models = [{"model": "base"}, {"model": "tuned"}]
    recipe = {"merge_method": "multislerp", "models": models, **({"base_model": "base"} if named else {})}
    plan = plan_of(root, recipe)
    assert [source.reference for source in plan.sources] == ["models:base", "models:tuned"][named:]
