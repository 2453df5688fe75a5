"""References → files that fit together: the base and every source of a recipe, in the order that merging takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import MergeyardError, Problem
from app.planning.matching import AdapterMatch, ModelMatch, match_adapter, match_model
from app.planning.plan import PlannedSource
from app.recipe import Recipe, SourceEntry
from app.recipe.methods import METHODS
from app.sources.references import split_adapter
from app.sources.resolver import Resolver
from app.sources.source import ModelSource, SourceFile


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """One entry of ``models``: a full model, an adapter, or (``X+adapter``) both; neither: the base itself."""

    entry: SourceEntry
    where: str
    model: ModelMatch | None
    adapter: AdapterMatch | None
    canonical: Mapping[str, str]  # {"model": …} or {"adapter": …}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The base and the sources that count, in merging order: the recipe's, or for symmetric methods a canonical one."""

    base: ModelSource
    sources: tuple[ResolvedSource, ...]

    def planned(self) -> tuple[PlannedSource, ...]:
        """The sources as the plan records them."""
        return tuple(_planned(source, self.base) for source in self.sources)


def resolve(recipe: Recipe, resolver: Resolver) -> Resolved:
    """Raises MergeyardError with the problems of every reference, each with its place in the recipe."""
    spec = METHODS[recipe.merge_method]
    base = _base(recipe, resolver)
    counts_base = spec.counts_base(named=recipe.base_model is not None)
    problems: list[Problem] = []
    sources = []
    for index, entry in enumerate(recipe.models):
        where = f"models[{index}]"
        try:
            resolved = _resolve(entry, where, base, resolver, aligned=recipe.vocabulary is not None)
            if resolved.model or resolved.adapter or counts_base:
                sources.append(resolved)
        except MergeyardError as error:
            problems.extend(placed(error, f"{where}.{'adapter' if entry.adapter else 'model'}"))
    if problems:
        raise MergeyardError.of(problems)
    if not sources:
        message = (
            "Every entry of `models` is the base itself, so nothing changes; name a fine-tuned model or an adapter"
        )
        raise MergeyardError("no_sources", message, where="models")
    if spec.symmetric:
        sources.sort(key=_canonical_order)
    return Resolved(base=base, sources=tuple(sources))


def _canonical_order(source: ResolvedSource) -> tuple[str, str]:
    """By reference, then by parameters, so that float32 sums do not depend on how a recipe lists its sources."""
    return json.dumps(source.canonical, sort_keys=True), json.dumps(source.entry.parameters, sort_keys=True)


def _base(recipe: Recipe, resolver: Resolver) -> ModelSource:
    """The base model; in a recipe without one a full model among the sources takes its place.

    That is the first one, or for symmetric methods the first in canonical order: what is added to what must not depend
    on the recipe's order.
    """
    if recipe.base_model:
        return _base_model(recipe.base_model, "base_model", resolver)
    places = [(f"models[{index}].model", entry.model) for index, entry in enumerate(recipe.models)]
    full = [(where, text) for where, text in places if text and not split_adapter(text)[1]]
    symmetric = METHODS[recipe.merge_method].symmetric
    if not full or (not symmetric and full[0] != places[0]):
        which = "one entry" if symmetric else "the first entry"
        message = f"Without a `base_model` {which} must be a full model"
        raise MergeyardError("recipe_invalid", message, where="models[0]")
    models = [_base_model(text, where, resolver) for where, text in (full if symmetric else full[:1])]
    return min(models, key=lambda model: model.reference)


def _base_model(text: str, where: str, resolver: Resolver) -> ModelSource:
    if split_adapter(text)[1]:
        message = "A base with an adapter on it is not supported yet; merge the adapter into the base first"
        raise MergeyardError("not_supported", message, where=where)
    try:
        return resolver.model(text)
    except MergeyardError as error:
        raise MergeyardError.of(placed(error, where)) from None


def _resolve(entry: SourceEntry, where: str, base: ModelSource, resolver: Resolver, *, aligned: bool) -> ResolvedSource:
    model_text, adapter_text = split_adapter(entry.model) if entry.model else (None, entry.adapter)
    model: ModelMatch | None = None
    canonical: dict[str, str] = {}
    if model_text is not None:
        reference = resolver.canonical(model_text)
        canonical["model"] = reference
        if reference != base.reference:
            model = match_model(resolver.model(model_text), base, aligned=aligned)
    adapter: AdapterMatch | None = None
    if adapter_text is not None:
        adapter = match_adapter(resolver.adapter(adapter_text), base, on=model.tensors if model else base.tensors)
        reference = adapter.source.reference
        canonical = {"model": f"{canonical['model']}+{reference}"} if model else {"adapter": reference}
    return ResolvedSource(entry=entry, where=where, model=model, adapter=adapter, canonical=canonical)


def placed(error: MergeyardError, where: str) -> list[Problem]:
    """A failure's problems at ``where`` in the recipe, unless they say where themselves."""
    return [
        Problem(code=problem.code, message=problem.message, where=problem.where or where) for problem in error.problems
    ]


def _planned(source: ResolvedSource, base: ModelSource) -> PlannedSource:
    files: tuple[SourceFile, ...] = ()
    if source.model:
        files += source.model.source.files
    if source.adapter:
        files += source.adapter.source.files
    reference = source.canonical.get("adapter") or source.canonical["model"]
    role = "model" if "model" in source.canonical else "adapter"
    if reference == base.reference:
        files = base.files
    return PlannedSource(reference=reference, role=role, files=files)
