"""References → files that fit together: the base and every source of a recipe, in the order that merging takes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.errors import MergeyardError, Problem
from app.planning.matching import AdapterMatch, check_model, match_adapter
from app.planning.modules import Modules, modules_of
from app.planning.plan import PlannedSource
from app.recipe import Recipe, SourceEntry
from app.recipe.grammar import LayersEntry, Part, Slice
from app.recipe.methods import METHODS, MethodSpec
from app.sources.references import split_adapter
from app.sources.resolver import Resolver
from app.sources.source import AdapterSource, ModelSource, SourceFile

MAX_PARTS = 4_000_000  # tensors of the result times their sources; each takes about half a kilobyte while planning


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """A source of the recipe: a full model, an adapter, or (``X+adapter``) both; neither: the base itself."""

    where: str
    model: ModelSource | None
    adapter: AdapterMatch | None
    canonical: Mapping[str, str]  # {"model": …} or {"adapter": …}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A source in one span: the layer of its own that becomes the span's first, and its parameters there."""

    source: int  # index into Resolved.sources
    first: int
    parameters: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers that are merged from the same sources: ``count`` of them (a slice), or None: whole models.

    ``base`` is the model merged onto, from its layer ``first`` on; ``based``: the recipe names it so. ``entries`` are
    the sources as the resolved recipe lists them, which names a base of the span's own in ``own_base``.
    """

    base: ModelSource
    first: int
    count: int | None
    uses: tuple[Use, ...]
    parameters: Mapping[str, Any]
    entries: tuple[Mapping[str, Any], ...]
    based: bool
    own_base: str | None
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPart:
    """A module of the result (None: all of it) and the spans it is made of, with the module's own parameters."""

    module: str | None
    spans: tuple[Span, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The base and the sources that count, in merging order: the recipe's, or for symmetric methods a canonical one.

    Whatever no part covers is the base's, as its config and tokenizer are.
    """

    base: ModelSource
    sources: tuple[ResolvedSource, ...]
    parts: tuple[ResolvedPart, ...]
    modules: Modules

    def planned(self) -> tuple[PlannedSource, ...]:
        """The sources as the plan records them, and after them the bases that slices have of their own."""
        sources = [_planned(source, self.base) for source in self.sources]
        known = {self.base.reference, *(source.model.reference for source in self.sources if source.model)}
        bases = {span.base.reference: span.base for part in self.parts for span in part.spans}
        own = [
            PlannedSource(reference=reference, role="base", files=model.files)
            for reference, model in bases.items()
            if reference not in known
        ]
        return (*sources, *own)


def resolve(recipe: Recipe, resolver: Resolver) -> Resolved:
    """Raises MergeyardError with the problems of every reference, each with its place in the recipe."""
    return _Resolving(recipe, resolver).result()


class _Resolving:
    """One recipe's references. Problems are collected, so that all of them show at once."""

    def __init__(self, recipe: Recipe, resolver: Resolver) -> None:
        self._recipe, self._resolver = recipe, resolver
        self._spec = METHODS[recipe.merge_method]
        self._problems: list[Problem] = []
        self._read: dict[str, ModelSource] = {}
        self._sources: list[ResolvedSource] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._parts = 0

    def result(self) -> Resolved:
        base = self._base()
        modules = self._modules(base)
        parts = tuple(self._part(where, part, base, modules) for where, part in self._recipe.parts.items())
        if self._problems:
            raise MergeyardError.of(self._problems)
        if not self._sources:
            where = next(key for key in ("models", "slices", "modules") if getattr(self._recipe, key))
            message = (
                f"Every entry of `{where}` is the base itself, so nothing changes; "
                "name a fine-tuned model or an adapter"
            )
            raise MergeyardError("no_sources", message, where=where)
        return Resolved(base=base, sources=tuple(self._sources), parts=parts, modules=modules)

    def _base(self) -> ModelSource:
        """The base model; in a recipe without one a model among the first sources takes its place."""
        if self._recipe.base_model:
            return self._base_model(self._recipe.base_model, "base_model")
        where, part = next(iter(self._recipe.parts.items()))
        inside = f"{where}." if where else ""
        if part.slices and part.slices[0].base_model:
            return self._base_model(part.slices[0].base_model, f"{inside}slices[0].base_model")
        if part.slices:
            return self._among(part.slices[0].sources, f"{inside}slices[0].sources")[0]
        return self._among(part.models, f"{inside}models")[0]

    def _among(self, entries: Sequence[SourceEntry], where: str) -> tuple[ModelSource, SourceEntry]:
        """The model that takes the base's place: the first, or for symmetric methods the first in canonical order.

        What is added to what must not depend on the recipe's order. Full models go before those with an adapter.
        """
        named = [(f"{where}[{index}].model", entry) for index, entry in enumerate(entries) if entry.model]
        full = [(place, entry) for place, entry in named if not split_adapter(str(entry.model))[1]]
        symmetric = self._spec.symmetric
        candidates = (full or named) if symmetric else named[:1]
        if not candidates or (not symmetric and entries[0].model is None):
            which = "one entry" if symmetric else "the first entry"
            message = f"Without a `base_model` {which} must be a full model"
            raise MergeyardError("recipe_invalid", message, where=f"{where}[0]")
        models = [(self._base_model(split_adapter(str(entry.model))[0], place), entry) for place, entry in candidates]
        return min(models, key=lambda pair: (pair[0].reference, _first_layer(pair[1])))

    def _base_model(self, text: str, where: str) -> ModelSource:
        try:
            return self._model(text)
        except MergeyardError as error:
            raise MergeyardError.of(placed(error, where)) from None

    def _model(self, text: str) -> ModelSource:
        if text not in self._read:
            self._read[text] = self._resolver.model(text)
        return self._read[text]

    def _adapter(self, text: str) -> AdapterSource:
        adapter = self._resolver.adapter(text)
        self._count(len(adapter.modules) + len(adapter.saved))
        return adapter

    def _count(self, tensors: int) -> None:
        """Before work that takes as long as there are tensors."""
        self._parts += tensors
        if self._parts > MAX_PARTS:
            raise too_many_parts()

    def _modules(self, base: ModelSource) -> Modules:
        """The way of dividing the checkpoint that knows every module of the recipe."""
        ways = modules_of(list(base.tensors))
        wanted = set(self._recipe.modules)
        for way in ways:
            if wanted <= set(way.names):
                return way
        message = f"{base.reference} has the modules {', '.join(ways[0].names)}"
        if len(ways) > 1 and ways[1].names != ways[0].names:
            message += f" (mergekit's names: {', '.join(ways[1].names)})"
        unknown = [name for name in self._recipe.modules if not any(name in way.names for way in ways)]
        raise MergeyardError.of(
            [
                Problem(code="module_unknown", message=f"{message}; name these.", where=f"modules.{name}")
                for name in unknown or self._recipe.modules
            ]
        )

    def _part(self, where: str, part: Part, base: ModelSource, modules: Modules) -> ResolvedPart:
        name = where.removeprefix("modules.") or None
        inside = f"{where}." if where else ""
        if part.slices:
            slices = enumerate(part.slices)
            spans = [self._slice(item, f"{inside}slices[{number}]", base) for number, item in slices]
        else:
            spans = [self._models(part, inside, base, (lambda tensor: modules.of(tensor) == name) if name else None)]
        return ResolvedPart(
            module=name,
            spans=tuple(span for span in spans if span is not None),
            parameters=part.parameters if name else {},
        )

    def _models(self, part: Part, inside: str, base: ModelSource, owns: Callable[[str], bool] | None) -> Span:
        """Whole models. The base among them is a source for some methods only, and else not listed."""
        found = []
        for index, entry in enumerate((*part.models, *self._unlisted_base(part, base))):
            where = f"{inside}models[{index}]" if index < len(part.models) else "base_model"
            try:
                found.append((self._resolve(entry, where, base, owns), entry))
            except MergeyardError as error:
                self._problems.extend(placed(error, f"{where}.{'adapter' if entry.adapter else 'model'}"))
        based = self._recipe.base_model is not None
        if not self._spec.counts_base(named=based):
            found = [(source, entry) for source, entry in found if source.model or source.adapter]
        uses, entries = self._uses(found)
        return Span(
            base=base,
            first=0,
            count=None,
            uses=uses,
            parameters={},
            entries=entries,
            based=based,
            own_base=None,
            where=f"{inside}models",
        )

    def _unlisted_base(self, part: Part, base: ModelSource) -> tuple[SourceEntry, ...]:
        """The base as one more source, which it is in mergekit where a mean of models names one and does not list it.

        mergekit refuses it where the recipe has no weight for it, and entries with `adapter:` need a base to sit on:
        there it is no source.
        """
        entries = part.models
        if not self._recipe.base_model or self._spec.base != "ignored" or self._spec.most is not None:
            return ()
        if any(entry.adapter or entry.model == self._recipe.base_model for entry in entries):
            return ()
        if any(self._is_model(entry, base) for entry in entries):
            return ()
        weighted = "weight" in part.parameters or "weight" in self._recipe.parameters
        if "weight" in self._spec.parameters and not weighted:
            return ()
        return (SourceEntry(model=self._recipe.base_model),)

    def _is_model(self, entry: SourceEntry, base: ModelSource) -> bool:
        """Whether an entry is the base itself, perhaps under another spelling. What cannot be found shows elsewhere."""
        try:
            return self._resolver.canonical(str(entry.model)) == base.reference
        except MergeyardError:
            return False

    def _slice(self, item: Slice, where: str, base: ModelSource) -> Span | None:
        """Layers, each source's own. What is the base at the layer it is merged onto may be no source."""
        named = base if self._recipe.base_model else None
        found = []
        try:
            named = self._base_model(item.base_model, f"{where}.base_model") if item.base_model else named
            for index, entry in enumerate(item.sources):
                found.append((self._resolve_layers(entry, f"{where}.sources[{index}]", named), entry))
        except MergeyardError as error:
            self._problems.extend(error.problems)
            return None
        try:
            own, first = self._slice_base(found, f"{where}.sources", named)
        except MergeyardError as error:
            self._problems.extend(error.problems)
            return None
        counted = self._spec.counts_base(named=named is not None)
        uses, entries = self._uses(
            found,
            lambda source, entry: (
                counted
                or source.adapter is not None
                or (source.model and source.model.reference, _first_layer(entry)) != (own.reference, first)
            ),
        )
        start, stop = item.sources[0].layer_range
        return Span(
            base=own,
            first=first,
            count=stop - start,
            uses=uses,
            parameters=item.parameters,
            entries=entries,
            based=named is not None,
            own_base=named.reference if named and item.base_model else None,
            where=f"{where}.sources",
        )

    def _slice_base(
        self, found: Sequence[tuple[ResolvedSource, LayersEntry]], where: str, named: ModelSource | None
    ) -> tuple[ModelSource, int]:
        """The model a slice is merged onto, and its first layer.

        A named base gives the layers that its own entry among the sources names, or, without such an entry, those that
        all sources name. Where there is none, or the method knows none, a source takes its place.
        """
        plain = [(source.model, entry) for source, entry in found if source.model and not source.adapter]
        if named is None or self._spec.base == "ignored":
            models = [(source.model, _first_layer(entry)) for source, entry in found if source.model]
            if self._spec.symmetric:  # as _among chooses
                first_layers = [(model, _first_layer(entry)) for model, entry in plain]
                return min(first_layers or models, key=lambda pair: (pair[0].reference, pair[1]))
            return models[0]
        own = {_first_layer(entry) for model, entry in plain if model.reference == named.reference}
        firsts = own or {_first_layer(entry) for _, entry in found}
        if len(own) > 1:
            message = "The base stands among the sources with different layers; list it once."
            raise MergeyardError("recipe_invalid", message, where=where)
        if len(firsts) > 1:
            message = (
                "The sources give different layers, so it is not plain which of the base's they change; list the base "
                "among the sources, with its `layer_range`."
            )
            raise MergeyardError("recipe_invalid", message, where=where)
        return named, min(firsts)

    def _uses(
        self,
        found: Sequence[tuple[ResolvedSource, SourceEntry]],
        counts: Callable[[ResolvedSource, SourceEntry], bool] = lambda _source, _entry: True,
    ) -> tuple[tuple[Use, ...], tuple[Mapping[str, Any], ...]]:
        """The entries that count, numbered, and all of them as the resolved recipe lists them."""
        if self._spec.symmetric:
            found = sorted(found, key=lambda pair: _canonical_order(pair[0], pair[1], self._spec))
        uses = []
        seen: Counter[str] = Counter()
        for source, entry in found:
            if counts(source, entry):
                key = json.dumps(source.canonical, sort_keys=True)
                number = self._number(source, key, seen[key])
                uses.append(
                    Use(source=number, first=_first_layer(entry), parameters=entry.parameters, where=source.where)
                )
                seen[key] += 1
        return tuple(uses), tuple(_listed(source, entry, self._spec) for source, entry in found)

    def _number(self, source: ResolvedSource, key: str, occurrence: int) -> int:
        """A source keeps its number from slice to slice; named twice in one, it is two sources."""
        number = self._numbers.setdefault((key, occurrence), len(self._sources))
        if number == len(self._sources):
            self._sources.append(source)
        return number

    def _resolve(
        self, entry: SourceEntry, where: str, base: ModelSource, owns: Callable[[str], bool] | None
    ) -> ResolvedSource:
        """A source of whole models: what it changes of the base."""
        model_text, adapter_text = split_adapter(entry.model) if entry.model else (None, entry.adapter)
        if entry.model and self._is_model(entry, base):
            model_text, adapter_text = entry.model, None  # the base may have an adapter on it
        aligned = self._recipe.vocabulary is not None
        self._count(len(base.tensors))
        model: ModelSource | None = None
        canonical: dict[str, str] = {}
        if model_text is not None:
            reference = self._resolver.canonical(model_text)
            canonical["model"] = reference
            if reference != base.reference:
                model = self._model(model_text)
                check_model(_only(model, owns), _only(base, owns), aligned=aligned)
        adapter: AdapterMatch | None = None
        if adapter_text is not None:
            tensors = model.tensors if model else base.tensors
            adapter = match_adapter(self._adapter(adapter_text), base, on=tensors)
            reference = adapter.source.reference
            # the resolved recipe names no base where one would mean another merge
            unnamed = self._spec.base != "required" and self._recipe.base_model is None
            full = model_text is not None and (model is not None or unnamed)
            canonical = {"model": f"{canonical['model']}+{reference}"} if full else {"adapter": reference}
        return ResolvedSource(where=where, model=model, adapter=adapter, canonical=canonical)

    def _resolve_layers(self, entry: LayersEntry, where: str, named: ModelSource | None) -> ResolvedSource:
        """A source of a slice, by itself: an ``adapter`` there is the named base with it."""
        try:
            if entry.model and named is not None and self._is_model(entry, named):
                model, adapter_text = named, None
            elif entry.model:
                model_text, adapter_text = split_adapter(entry.model)
                model = self._model(model_text)
            elif named is not None:
                model, adapter_text = named, entry.adapter
            else:
                message = "An adapter needs the `base_model` it sits on; name it, or write model: base+adapter."
                raise MergeyardError("recipe_invalid", message)
            adapter = None
            canonical = model.reference
            if adapter_text is not None:
                adapter = match_adapter(self._adapter(adapter_text), model, on=model.tensors)
                canonical = f"{model.reference}+{adapter.source.reference}"
        except MergeyardError as error:
            raise MergeyardError.of(placed(error, f"{where}.{'adapter' if entry.adapter else 'model'}")) from None
        return ResolvedSource(where=where, model=model, adapter=adapter, canonical={"model": canonical})


def _first_layer(entry: SourceEntry) -> int:
    return entry.layer_range[0] if isinstance(entry, LayersEntry) else 0


def _only(model: ModelSource, owns: Callable[[str], bool] | None) -> ModelSource:
    if owns is None:
        return model
    return replace(model, tensors={name: spec for name, spec in model.tensors.items() if owns(name)})


def _canonical_order(source: ResolvedSource, entry: SourceEntry, spec: MethodSpec) -> tuple[str, str, int]:
    """By reference, then by parameters, so that float32 sums do not depend on how a recipe lists its sources."""
    return (
        json.dumps(source.canonical, sort_keys=True),
        json.dumps(spec.used(entry.parameters), sort_keys=True),
        _first_layer(entry),
    )


def _listed(source: ResolvedSource, entry: SourceEntry, spec: MethodSpec) -> Mapping[str, Any]:
    layers = {"layer_range": list(entry.layer_range)} if isinstance(entry, LayersEntry) else {}
    return {**source.canonical, **layers, "parameters": spec.used(entry.parameters)}


def too_many_parts() -> MergeyardError:
    message = f"The result would have more than {MAX_PARTS} tensors, counted once for each of their sources; name fewer"
    return MergeyardError("recipe_invalid", message)


def placed(error: MergeyardError, where: str) -> list[Problem]:
    """A failure's problems at ``where`` in the recipe, unless they say where themselves."""
    return [
        Problem(code=problem.code, message=problem.message, where=problem.where or where) for problem in error.problems
    ]


def _planned(source: ResolvedSource, base: ModelSource) -> PlannedSource:
    files: tuple[SourceFile, ...] = ()
    if source.model:
        files += source.model.files
    if source.adapter:
        files += source.adapter.source.files
    reference = source.canonical.get("adapter") or source.canonical["model"]
    role = "model" if "model" in source.canonical else "adapter"
    if reference == base.reference:
        files = base.files
    return PlannedSource(reference=reference, role=role, files=files)
