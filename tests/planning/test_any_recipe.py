"""Whatever a recipe says: a plan that survives its own canonical form, or a list of problems; never a stack trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import MergeyardError
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.recipe.methods import METHODS, MethodSpec, Parameter
from app.sources.resolver import Resolver
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model

MODELS = (
    "a",
    "b",
    "short",
    "long",
    "words",
    "a+sql",
    "models:b+models:json",
    "a@main",
    "none",
    "t",
    "",
    "../a",
    {"model": {"path": "b"}},
)
TABLE = "model.embed_tokens"
ADAPTERS = ("sql", "json", "norm", "table", "grown", "a", "none")
LETTERS = "abcdefghijklmnop"  # the tokens of the sixteen rows
PLAIN = st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.text(max_size=5)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def resolver(tmp_path_factory: pytest.TempPathFactory) -> Resolver:
    root = tmp_path_factory.mktemp("root")
    write_model(root / "a", llama_tensors(4), num_hidden_layers=4, vocab_size=16, eos_token_id=3)
    write_model(root / "b", llama_tensors(4, seed=5), num_hidden_layers=4, vocab_size=16)
    longer = llama_tensors(4, seed=7)
    longer[f"{TABLE}.weight"] = torch.ones(18, 8)
    write_model(root / "long", longer, num_hidden_layers=4, vocab_size=18)
    write_words(root / "a", LETTERS)
    write_words(root / "b", "ba" + LETTERS[2:12], ["<1>", "<2>", "<3>", "<4>"])
    write_words(root / "long", LETTERS, ["<1>", "<5>", "<beyond its rows>"], chat_template="{{ messages }}")
    write_words(root / "words", LETTERS[:10], ["<6>"])
    write_model(root / "short", llama_tensors(2, seed=6), num_hidden_layers=2)
    stacks = {
        f"{part}.block.{layer}.x.weight": llama_tensors()["model.norm.weight"] for part in "ed" for layer in (0, 1)
    }
    write_model(root / "t", stacks, model_type="t5", num_layers=2)
    write_adapter(root / "sql")
    write_adapter(root / "json")
    saved = {"base_model.model.model.norm.weight": torch.ones(8)}
    write_adapter(root / "norm", {**lora_tensors(), **saved}, modules_to_save=["norm"])
    key = f"base_model.model.{TABLE}"
    table = {f"{key}.lora_embedding_A": torch.ones(2, 16), f"{key}.lora_embedding_B": torch.ones(8, 2)}
    write_adapter(root / "table", {**lora_tensors(), **table}, ensure_weight_tying=True)
    grown = {f"{key}.weight": torch.ones(19, 8)}
    write_adapter(root / "grown", grown, ensure_weight_tying=True, modules_to_save=["embed_tokens"])
    return Resolver(roots=[root])


def write_words(folder: Path, letters: str, added: Sequence[str] = (), **config: Any) -> None:
    """A tokenizer of single letters, and of added tokens after them."""
    folder.mkdir(exist_ok=True)
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    beside = [{"id": len(letters) + index, "content": content} for index, content in enumerate(added)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": beside}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


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


def outputs(*, right: bool, adapter: bool) -> st.SearchStrategy[dict[str, Any]]:
    """``right``: as the kind takes them; ``adapter``: whether that kind may be drawn then."""
    checkpoint = st.fixed_dictionaries(
        {}, optional={"kind": st.just("checkpoint"), "max_shard_size": st.integers(1, 5000) | st.just("1KB")}
    )
    low_rank = st.fixed_dictionaries(
        {"kind": st.just("adapter")},
        optional={
            "rank": st.integers(1, 600),
            "min_retained_energy": st.floats(0, 1),
            "other": st.sampled_from(["refuse", "save", "drop"]),
        },
    )
    if right:
        return checkpoint | low_rank if adapter else checkpoint
    wild = st.sampled_from(["rank", "min_retained_energy", "other", "max_shard_size", "kind", "surprise"])
    return st.builds(lambda known, more: {**known, **more}, checkpoint | low_rank, st.dictionaries(wild, ANYTHING))


def tokenizers(*, right: bool) -> st.SearchStrategy[dict[str, Any]]:
    """The keys of the tokenizer, ``right`` ones or with something in them that nobody means."""
    models = st.sampled_from(["a", "b", "long"] if right else MODELS)
    tokens = st.sampled_from(["a", "c", "p", "<1>", "<5>", "<beyond its rows>", "<new>", "<6>"])
    named = {"kind": st.just("model_token"), "model": models}
    source = (
        models
        | st.just({"kind": "zero"})
        | st.fixed_dictionaries({"kind": st.just("model"), "model": models})
        | st.fixed_dictionaries({**named, "token": tokens})
        | st.fixed_dictionaries({**named, "token_id": st.integers(0, 17)})
    )
    setting = st.fixed_dictionaries({}, optional={"source": source}) | st.fixed_dictionaries(
        {"source": source, "force": st.booleans()}
    )
    whole = {
        "source": st.sampled_from(["base", "union", "a", "b", "long", "words"]),
        "tokens": st.dictionaries(tokens, setting, max_size=2) | st.none(),
        "pad_to_multiple_of": st.integers(1, 64) | st.none(),
        "missing": st.sampled_from(["base", "mean"]),
    }
    section = st.fixed_dictionaries({}, optional=whole)
    template = st.sampled_from(["auto", "chatml", "llama3", "{{ messages }}"])
    if not right:
        section |= ANYTHING | st.builds(
            lambda known, more: {**known, **more},
            section,
            st.dictionaries(st.sampled_from([*whole, "surprise"]), ANYTHING | st.dictionaries(tokens, ANYTHING)),
        )
        template |= st.sampled_from(["x", ""])
    short = st.sampled_from(["base", "union", "a", "long", *([] if right else ["", "none"])])
    chat = {"chat_template": template}
    both = st.just({"tokenizer": {}, "tokenizer_source": "union"})
    return (
        st.fixed_dictionaries({"tokenizer": section}, optional=chat)
        | st.fixed_dictionaries({"tokenizer_source": short}, optional=chat)
        | st.fixed_dictionaries(chat)
        | (st.nothing() if right else both)
    )


@st.composite
def recipes(draw: st.DrawFn, *, right: bool | None = None) -> dict[str, Any]:
    """The whole grammar, half of the time (unless told) with nothing wrong that is known to be."""
    spec = METHODS[method := draw(st.sampled_from(sorted(METHODS)))]
    right = draw(st.booleans()) if right is None else right
    own = parameters_of(spec, level="source", right=right)
    part = parameters_of(spec, level="part", right=right)
    words = draw(tokenizers(right=right)) if draw(st.booleans()) else {}
    known = [
        "a",
        "b",
        "a+sql",
        "b+json",
        "a+sql+json",
        *(["long"] if words.keys() & {"tokenizer", "tokenizer_source"} else []),
    ]
    named = st.sampled_from(known if right else MODELS)
    model = st.fixed_dictionaries({"model": named}, optional={"parameters": own})
    adapters = st.sampled_from(ADAPTERS[:3] if right else ADAPTERS)
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
    based = {"base_model": st.sampled_from(["a", "a", "a+sql"]) if right else st.sampled_from(MODELS)}
    whole = {"parameters": parameters_of(spec, level="recipe", right=right)}
    optional = {
        "dtype": st.sampled_from(["float16", "torch.bfloat16"] if right else ["int8", 3]),
        "out_dtype": st.sampled_from(["float32", None]),
        "name": st.text(max_size=4),
        "output": outputs(right=right, adapter="models" in shape and not words),
    }
    wrong = {
        "models": ANYTHING,
        "surprise": ANYTHING,
    }
    needs = {**based, **whole} if right and spec.base == "required" else whole
    more = {**optional} if right else {**based, **optional, **wrong}
    if right and spec.base != "required":
        more |= based
    rest = draw(st.fixed_dictionaries(needs, optional=more))
    if right and rest.get("output", {}).get("kind") == "adapter" and "base_model" in rest:
        rest["base_model"] = "a"  # an adapter for a base that is made on the way is refused
    return {"merge_method": method, **shape, **words, **rest}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Two or three documents, in which later ones name earlier ones where they named models."""
    names = ["left", "right"][: draw(st.integers(1, 2))]
    right = draw(st.booleans())
    found: list[Any] = []
    for index, name in enumerate([*names, None]):
        made = draw(recipes(right=right))
        made.pop("name", None)
        if right and name:
            made.pop("output", None)
        others = [*names[:index], f"{names[index - 1]}+sql", *([] if right else names)] if index else ["a", "b"]
        swapped = draw(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(others), min_size=1))
        found.append({**_named(made, swapped), **({"name": name} if name else {})})
    if not right and draw(st.booleans()):
        found.insert(draw(st.integers(0, 2)), draw(ANYTHING | st.just(found[0])))
    return {"documents": draw(st.permutations(found)) if draw(st.booleans()) else found}


def _named(value: Any, swapped: Mapping[str, str]) -> Any:
    """The same with other references."""
    if isinstance(value, dict):
        named = ("model", "base_model", "tokenizer_source", "source")
        return {
            key: swapped.get(item, item) if key in named and isinstance(item, str) else _named(item, swapped)
            for key, item in value.items()
        }
    return [_named(item, swapped) for item in value] if isinstance(value, list) else value


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


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_a_recipe_is_planned_or_refused(recipe: dict[str, Any], resolver: Resolver) -> None:
    check(recipe, resolver)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=documents())
def test_several_documents_are_planned_or_refused(recipe: dict[str, Any], resolver: Resolver) -> None:
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
    keys = ("models", "slices", "modules", "tokenizer", "tokenizer_source", "chat_template")
    found = dict.fromkeys([*keys, "adapter", "base with an adapter", "documents"], 0)

    @settings(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipe=recipes(right=True))
    def count(recipe: dict[str, Any]) -> None:
        try:
            plan = make_plan(parse_recipe(recipe), resolver)
        except MergeyardError:
            return
        for key in keys:
            found[key] += key in recipe
        found["adapter"] += plan.adapter is not None
        found["base with an adapter"] += "+" in str(recipe.get("base_model"))

    @settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipe=documents())
    def count_documents(recipe: dict[str, Any]) -> None:
        try:
            plan = make_plan(parse_recipe(recipe), resolver)
        except MergeyardError:
            return
        found["documents"] += len(plan.earlier) > 0

    count()
    count_documents()
    assert all(found.values()), found
