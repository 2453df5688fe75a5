"""Whatever a recipe says: a plan that survives its own canonical form, or a list of problems; never a stack trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import MergeyardError
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.recipe.methods import METHODS, MethodSpec, Parameter
from app.sources.resolver import Resolver
from tests.files import llama_tensors, write_adapter, write_model

MODELS = (
    "a",
    "b",
    "short",
    "a+sql",
    "models:b+models:json",
    "a@main",
    "none",
    "t",
    "",
    "../a",
    {"model": {"path": "b"}},
)
ADAPTERS = ("sql", "json", "a", "none")
PLAIN = st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.text(max_size=5)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> Resolver:
    root = tmp_path_factory.mktemp("root")
    write_model(root / "a", llama_tensors(4), num_hidden_layers=4)
    write_model(root / "b", llama_tensors(4, seed=5), num_hidden_layers=4)
    write_model(root / "short", llama_tensors(2, seed=6), num_hidden_layers=2)
    stacks = {
        f"{part}.block.{layer}.x.weight": llama_tensors()["model.norm.weight"] for part in "ed" for layer in (0, 1)
    }
    write_model(root / "t", stacks, model_type="t5", num_layers=2)
    write_adapter(root / "sql")
    write_adapter(root / "json")
    return Resolver(roots=[root])


def value_of(parameter: Parameter, *, right: bool) -> st.SearchStrategy[Any]:
    """Values as the parameter takes them, with gradients and filters, and now and then as it does not."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "number": st.floats(0.25, 0.75) if right else st.floats(0, 1) | st.sampled_from([0, 1, 0.25, -0.5]),
        "whole": st.integers(0, 5),
        "flag": st.booleans(),
        "choice": st.sampled_from(parameter.choices or ("x",)),
    }
    one = kinds[parameter.kind]
    if parameter.kind in ("choice", "whole"):
        return one if right else one | PLAIN
    entry = st.fixed_dictionaries(
        {"value": one | st.lists(one, min_size=1, max_size=3)},
        optional={"filter": st.sampled_from(["*", "mlp", "layers.1.", None])},
    )
    several = one | st.lists(one, min_size=1, max_size=3) | st.lists(entry, min_size=1, max_size=3) | entry
    return several if right else several | st.just([]) | ANYTHING


def parameters_of(spec: MethodSpec, *, level: str, right: bool) -> st.SearchStrategy[dict[str, Any]]:
    known = {
        name: value_of(item, right=right)
        for name, item in spec.parameters.items()
        if level == "recipe" or item.per_source or (level == "part" and item.kind not in ("choice", "whole"))
    }
    needed = {name for name in known if right and level == "recipe" and spec.parameters[name].required}
    return st.fixed_dictionaries(
        {name: known[name] for name in needed},
        optional={name: value for name, value in known.items() if name not in needed},
    )


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """The whole grammar, half of the time with nothing wrong that is known to be."""
    spec = METHODS[method := draw(st.sampled_from(sorted(METHODS)))]
    right = draw(st.booleans())
    own = parameters_of(spec, level="source", right=right)
    part = parameters_of(spec, level="part", right=right)
    named = st.sampled_from(["a", "b", "a+sql", "b+json"]) if right else st.sampled_from(MODELS)
    model = st.fixed_dictionaries({"model": named}, optional={"parameters": own})
    adapters = st.sampled_from(ADAPTERS[:2] if right else ADAPTERS)
    adapter = st.fixed_dictionaries({"adapter": adapters}, optional={"parameters": own})
    models = st.lists(model | adapter, min_size=1, max_size=3)

    @st.composite
    def one_slice(draw: st.DrawFn) -> dict[str, Any]:
        length = draw(st.integers(1, 2))
        ranges = st.integers(0, 4 - length).map(lambda start: [start, start + length])
        if right:
            ranges = st.just(draw(ranges)) if draw(st.integers(0, 3)) else ranges
        sources = draw(models)
        for source in sources:
            source["layer_range"] = draw(ranges if right else ranges | st.sampled_from([[0, 9], [1, 1], "x"]))
        extra = {"parameters": part, "base_model": st.sampled_from(["a", "b"] if right else ["a", "b", "none"])}
        return {"sources": sources, **draw(st.fixed_dictionaries({}, optional=extra))}

    slices = st.lists(one_slice(), min_size=1, max_size=3)
    module = st.fixed_dictionaries({"models": models}, optional={"parameters": part})
    sliced = st.fixed_dictionaries({"slices": slices}, optional={"parameters": part})
    names = st.just("default") if right else st.sampled_from(["default", "e", "d.block", "x"])
    shape = draw(
        st.fixed_dictionaries({"models": models})
        | st.fixed_dictionaries({"slices": slices})
        | st.fixed_dictionaries({"modules": st.dictionaries(names, module | sliced, min_size=1, max_size=2)})
    )
    based = {"base_model": st.just("a") if right else st.sampled_from(MODELS)}
    whole = {"parameters": parameters_of(spec, level="recipe", right=right)}
    kinds = st.sampled_from(["checkpoint"] if right else ["checkpoint", "adapter"])
    optional = {
        "dtype": st.sampled_from(["float16", "torch.bfloat16"] if right else ["int8", 3]),
        "out_dtype": st.sampled_from(["float32", None]),
        "name": st.text(max_size=4),
        "output": st.fixed_dictionaries({"kind": kinds}, optional={"max_shard_size": st.integers(1, 5000)}),
    }
    wrong = {
        "tokenizer_source": st.sampled_from(["base", "union", "b", ""]),
        "tokenizer": ANYTHING,
        "chat_template": st.sampled_from(["auto", "chatml", "x"]),
        "models": ANYTHING,
        "surprise": ANYTHING,
    }
    needs = {**based, **whole} if right and spec.base == "required" else whole
    more = {**optional} if right else {**based, **optional, **wrong}
    if right and spec.base != "required":
        more |= based
    return {"merge_method": method, **shape, **draw(st.fixed_dictionaries(needs, optional=more))}


def check(source: str | bytes | dict[str, Any], resolver: Resolver) -> None:
    try:
        plan = make_plan(parse_recipe(source), resolver)
    except MergeyardError as error:
        assert all(problem.message for problem in error.problems)
        return
    again = make_plan(parse_recipe(json.loads(json.dumps(plan.recipe))), resolver)
    assert again.digest == plan.digest
    assert again.recipe == plan.recipe
    assert again.shards == plan.shards


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_a_recipe_is_planned_or_refused(recipe: dict[str, Any], resolver: Resolver) -> None:
    check(recipe, resolver)


@settings(max_examples=30, deadline=None)
@given(recipe=recipes())
def test_a_recipe_in_yaml_is_the_same_recipe(recipe: dict[str, Any], resolver: Resolver) -> None:
    check(yaml.safe_dump(recipe), resolver)


@settings(max_examples=200, deadline=None)
@given(source=st.text() | st.binary() | ANYTHING.map(yaml.safe_dump))
def test_any_text_is_refused(source: str | bytes, resolver: Resolver) -> None:
    with pytest.raises(MergeyardError):
        parse_recipe(source)


def test_the_grammar_is_reached(resolver: Resolver) -> None:
    """The strategy is worth something only if it finds plans too."""
    found = {"models": 0, "slices": 0, "modules": 0}

    @settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipe=recipes())
    def count(recipe: dict[str, Any]) -> None:
        try:
            make_plan(parse_recipe(recipe), resolver)
        except MergeyardError:
            return
        for key in found:
            found[key] += key in recipe

    count()
    assert all(found.values()), found
