"""What each source is to a merge."""

from __future__ import annotations

from app.recipe import parse_recipe
from app.recipe.roles import Named, named_sources

ADAPTERS = {
    "base_model": "models:llama",
    "merge_method": "ties",
    "models": [
        {"adapter": "models:sql"},
        {"model": "merge:mrg-1+upload:sha256-" + "a" * 64},
        {"adapter": "models:sql"},
    ],
}


def test_every_source_is_named_once_in_each_role() -> None:
    assert named_sources(parse_recipe(ADAPTERS)) == (
        Named("base", "models:llama"),
        Named("adapter", "models:sql"),
        Named("model", "merge:mrg-1"),
        Named("adapter", "upload:sha256-" + "a" * 64),
    )


def test_of_several_documents_those_that_are_made_on_the_way_are_none() -> None:
    averaged = {"merge_method": "linear", "models": [{"model": "both"}, {"model": "models:tuned"}]}
    averaged["parameters"] = {"weight": 0.5}  # type: ignore[assignment]
    recipe = parse_recipe({"documents": [{**ADAPTERS, "name": "both"}, averaged]})
    assert [named for named in named_sources(recipe) if named.role != "adapter"] == [
        Named("base", "models:llama"),
        Named("model", "merge:mrg-1"),
        Named("model", "models:tuned"),
    ]


def test_a_lender_of_tokens_is_one_too_and_base_and_union_are_words() -> None:
    lent = {"tokenizer": {"source": "union", "tokens": {"<x>": {"source": "models:lender"}}}}
    assert Named("tokenizer", "models:lender") in named_sources(parse_recipe({**ADAPTERS, **lent}))
    assert "union" not in {named.reference for named in named_sources(parse_recipe({**ADAPTERS, **lent}))}


def test_layers_from_here_and_there() -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "models:a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "models:b", "layer_range": [2, 4]}]},
        ],
    }
    assert named_sources(parse_recipe(recipe)) == (Named("model", "models:a"), Named("model", "models:b"))
