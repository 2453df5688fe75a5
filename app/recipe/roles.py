"""What each reference of a recipe is to its merge: the base, a model, an adapter, or a lender of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from app.recipe.grammar import Recipe
from app.sources.references import split_adapter

Role = Literal["base", "model", "adapter", "tokenizer"]


@dataclass(frozen=True, slots=True)
class Named:
    """A source as a recipe names it."""

    role: Role
    reference: str


def named_sources(recipe: Recipe) -> tuple[Named, ...]:
    """Every source of the recipe and of the documents before it, once in each role, as they come.

    ``X+adapter`` is two of them. Documents that others read are no sources: they are made on the way.
    """
    made = {document.name for document in recipe.earlier}
    found = (named for document in (*recipe.earlier, recipe) for named in _of_document(document))
    return tuple(dict.fromkeys(named for named in found if named.reference not in made))


def _of_document(recipe: Recipe) -> Iterator[Named]:
    if recipe.base_model:
        yield from _parts("base", recipe.base_model)
    for part in recipe.parts.values():
        for item in part.slices:
            if item.base_model:
                yield from _parts("base", item.base_model)
    for _, entry in recipe.entries():
        if entry.model:
            yield from _parts("model", entry.model)
        if entry.adapter:
            yield Named("adapter", entry.adapter)
    if vocabulary := recipe.vocabulary:
        lent = [token.source.model for token in vocabulary.tokens.values() if token.source]
        for text in (vocabulary.source, *lent):
            if text and ":" in text:  # `base` and `union` are words
                yield from _parts("tokenizer", text)


def _parts(role: Role, text: str) -> Iterator[Named]:
    model, adapter = split_adapter(text)
    if adapter is None:
        yield Named(role, model)
    else:
        yield from _parts(role, model)
        yield Named("adapter", adapter)
