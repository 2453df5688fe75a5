"""Recipes: what is accepted, and what a wrong one is told."""

from __future__ import annotations

from typing import Any

import pytest

from app.errors import MergeyardError
from app.recipe import parse_recipe

MERGEKIT_TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def problems_of(source: str | bytes | dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(MergeyardError) as caught:
        parse_recipe(source)
    return [(problem.code, problem.where) for problem in caught.value.problems]


def test_a_mergekit_ties_recipe_is_accepted_unchanged() -> None:
    recipe = parse_recipe(MERGEKIT_TIES)
    assert recipe.file_dtype == "F16"
    assert recipe.models[0].model == "psmathur/orca_mini_v3_13b"
    assert recipe.models[1].parameters["weight"] == [0.0, 0.3, 0.7, 1.0]


def test_json_and_yaml_give_the_same_recipe() -> None:
    json_text = '{"merge_method": "linear", "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.5}}]}'
    yaml_text = "merge_method: linear\nmodels:\n- model: a\n- {model: b, parameters: {weight: 0.5}}\n"
    assert parse_recipe(json_text) == parse_recipe(yaml_text)


def test_exponents_without_a_dot_are_numbers() -> None:
    recipe = parse_recipe("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1e-1}}]")
    assert recipe.models[0].parameters["weight"] == 0.1


def test_out_dtype_wins_over_dtype() -> None:
    recipe = parse_recipe("merge_method: linear\nmodels: [{model: a}]\ndtype: float16\nout_dtype: bfloat16")
    assert recipe.file_dtype == "BF16"


def test_every_problem_is_reported_at_once_with_its_place() -> None:
    found = problems_of(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "x", "parameters": {"density": 1.5, "weigth": 1, "lambda": 1}}, {}],
            "parameters": {"dialect": "pepft", "normalize": "yes"},
        }
    )
    assert found == [
        ("parameter_invalid", "parameters.dialect"),
        ("parameter_invalid", "parameters.normalize"),
        ("parameter_invalid", "models[0].parameters.density"),
        ("unknown_key", "models[0].parameters.weigth"),
        ("parameter_invalid", "models[0].parameters.lambda"),
        ("recipe_invalid", "models[1]"),
    ]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ({"merge_metod": "ties", "merge_method": "ties"}, "`merge_method`"),
        ({"merge_method": "linear", "models": [{"modl": "x"}]}, "`model`"),
        ({"merge_method": "linear", "models": [{"model": "x"}], "output": {"max_shard_sze": 1}}, "`max_shard_size`"),
        ({"merge_method": "tiess", "models": [{"model": "x"}]}, "`ties`"),
        ({"merge_method": "linear", "models": [{"model": "x", "parameters": {"wieght": 1}}]}, "`weight`"),
    ],
)
def test_a_misspelt_key_names_the_nearest_known_one(wrong: dict[str, Any], nearest: str) -> None:
    with pytest.raises(MergeyardError) as caught:
        parse_recipe(wrong)
    assert caught.value.code in ("unknown_key", "unknown_method")
    assert f"did you mean {nearest}" in caught.value.message


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("{a: [", "recipe_syntax"),
        ("", "recipe_syntax"),
        ("just text", "recipe_syntax"),
        (b"\xff\xfe\x00", "recipe_syntax"),
        ("x: 1\nx: 2", "recipe_syntax"),
        ('{"merge_method": "ties", "merge_method": "linear"}', "recipe_syntax"),
        ("a: &a [*a]", "recipe_syntax"),
        ("!!python/object/apply:os.system [ls]", "recipe_syntax"),
        ("? [1, 2]\n: 3", "recipe_syntax"),
        ("a: 1\n---\nb: 2", "recipe_invalid"),
        ("merge_method: nonsense\nmodels: [{model: a}]", "unknown_method"),
        ("merge_method: linear\nmodels: []", "no_sources"),
        ("merge_method: linear", "no_sources"),
        ("merge_method: ties\nmodels: [{model: a}]", "recipe_invalid"),
        ("merge_method: linear\nmodels: [{model: a, adapter: b}]", "recipe_invalid"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "parameter_invalid"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: true}}]", "parameter_invalid"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]", "parameter_invalid"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, {value: 2}]}}]", "parameter_invalid"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]", "parameter_invalid"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: int8", "recipe_invalid"),
        ('{"merge_method": "linear", "models": [{"model": "a"}], "chat_template": "{\\ud800}"}', "recipe_invalid"),
        ("merge_method: linear\nmodels: [{model: a}]\noutput: {max_shard_size: 0}", "recipe_invalid"),
        (
            "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {source: union}\ntokenizer_source: base",
            "recipe_invalid",
        ),
        (f"merge_method: linear\nmodels: [{{model: a}}]\noutput: {{max_shard_size: '{'9' * 400}'}}", "recipe_invalid"),
        (f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 0x{'f' * 5000}}}}}]", "recipe_syntax"),
        (f"merge_method: linear\nmodels: [{{model: {'a' * 3000}}}]", "recipe_syntax"),
        ("#" * 300_000, "recipe_syntax"),
        ("merge_method: linear\nmodels:\n" + "- model: a\n" * 300, "recipe_invalid"),
        ('{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1e999}}]}', "recipe_syntax"),
    ],
)
def test_a_wrong_recipe_has_a_stable_code(source: str | bytes, code: str) -> None:
    assert problems_of(source)[0][0] == code


def test_aliases_that_unfold_without_end_are_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert problems_of("\n".join(lines)) == [("recipe_syntax", "")]


@pytest.mark.timeout(10)
def test_merge_keys_that_unfold_without_end_are_refused_quickly() -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    assert problems_of("\n".join(lines))[0][0] == "recipe_syntax"
    chain = ["a0: &a0 {k0: 1}"] + [f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}" for i in range(1, 3000)]
    assert problems_of("\n".join(chain))[0][0] == "recipe_syntax"


def test_one_mapping_may_be_merged_in() -> None:
    text = "merge_method: linear\nmodels:\n- &a {model: x, parameters: {weight: 2}}\n- {<<: *a, model: y}"
    assert [entry.parameters for entry in parse_recipe(text).models] == [{"weight": 2.0}] * 2


@pytest.mark.timeout(10)
def test_a_key_given_twice_among_many_is_found_quickly() -> None:
    text = "{" + ", ".join(f'"k{i}": 1' for i in range(20_000)) + ', "k0": 1}'
    assert problems_of(text) == [("recipe_syntax", "")]


def test_what_mergekit_takes_is_taken() -> None:
    text = """
    merge_method: task_arithmetic
    base_model: b
    models: [{model: a, parameters: {weight: 1, density: 0.5}}, {model: c, parameters: }]
    parameters: {normalize: 1.0, int8_mask: 1, rescale: false}
    tokenizer: {source: base}
    dtype: torch.bfloat16
    """
    recipe = parse_recipe(text)
    assert recipe.parameters["normalize"] is True
    assert recipe.file_dtype == "BF16"
