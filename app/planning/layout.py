"""Which tensors the result has and where each one's values come from: slots, before any parameter is read.

The base's tensors under their own names; or, with ``slices``, what comes before the layers from the first slice's
sources, the layers slice by slice, numbered anew, and what comes after them from the last slice's (as in mergekit).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import MergeyardError, Problem
from app.planning import resolving
from app.planning.matching import vocabulary_tensors
from app.planning.modules import comes_before_layers, stacks_of
from app.planning.parameters import Levels
from app.planning.plan import LoraFactors, ScaledTensor
from app.planning.resolving import Resolved, ResolvedPart, Span, Use
from app.recipe import Recipe
from app.recipe.values import Position, layer_name
from app.sources.safetensors import FLOATS
from app.sources.source import ModelSource, StoredTensor

# What a config says of every layer at once; shapes tell the rest.
CONFIGURED = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSource:
    """One source in one slot: what it changes there (neither: nothing), and its own parameters.

    ``position`` is the slot's, with the name that the tensor has in this source.
    """

    source: int  # index into Resolved.sources
    full: StoredTensor | None
    lora: LoraFactors | None
    added: ScaledTensor | None
    levels: Levels
    position: Position

    @property
    def changes(self) -> bool:
        return self.full is not None or self.lora is not None or self.added is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor of the result: its name, the tensor it starts from, who may change it.

    ``levels`` are the parameters of slice, module and whole merge; ``position`` decides gradients and filters.
    ``based``: the recipe names a base for it. ``where`` its sources stand in the recipe; empty where it is only copied.
    ``dtype`` is the type that it has in the end, where that is not the one that ``base`` is read as.
    """

    name: str
    base: StoredTensor
    position: Position
    sources: tuple[SlotSource, ...]
    levels: Levels
    based: bool
    where: str
    dtype: str | None = None

    @property
    def floating(self) -> bool:
        """Whole numbers are copied, never merged."""
        return self.base.dtype in FLOATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Restacked:
    """A stack of layers that slices made: for every layer of the result, the model it comes from and its number there.

    ``module`` is the module's name, ``default`` where the checkpoint has one.
    """

    module: str
    stack: str
    layers: tuple[tuple[ModelSource, int], ...]


def lay_out(recipe: Recipe, resolved: Resolved) -> tuple[Slot, ...]:
    """The slots in the order they are written: that of the base's files, and after them what it does not have.

    Raises:
        MergeyardError: with every slice that does not fit, at its place in the recipe.
    """
    problems: list[Problem] = []
    slots: list[Slot] = []
    for part in resolved.parts:
        levels = (part.parameters, recipe.parameters)
        if part.spans[0].count is None:
            slots.extend(_whole(resolved, part, levels))
        else:
            free = vocabulary_tensors(resolved.base) if recipe.vocabulary else frozenset()
            slots.extend(_Stack(resolved, part, problems, free).slots(levels))
    if problems:
        raise MergeyardError.of(list({(problem.code, problem.where): problem for problem in problems}.values()))
    covered = {part.module for part in resolved.parts}
    for name, spec in resolved.base.tensors.items():
        if None not in covered and resolved.modules.of(name) not in covered:
            position = Position(name, None, 0)
            lasting = resolved.base.lasting.get(name)
            slots.append(
                Slot(
                    name=name,
                    base=spec,
                    position=position,
                    sources=(),
                    levels=(),
                    based=False,
                    where="",
                    dtype=lasting,
                )
            )
    order = {name: index for index, name in enumerate(resolved.base.tensors)}
    return tuple(sorted(slots, key=lambda slot: order.get(slot.name, len(order))))


def restacked(resolved: Resolved) -> tuple[Restacked, ...]:
    """The stacks that slices made. Every slice fits: ``lay_out`` has seen them."""
    found = []
    for part in resolved.parts:
        if part.spans[0].count is not None:
            layers = [(span.base, span.first + index) for span in part.spans for index in range(span.count or 0)]
            found.append(
                Restacked(
                    module=part.module or resolved.modules.names[0],
                    stack=next(iter(_stacks(resolved, part))),
                    layers=tuple(layers),
                )
            )
    return tuple(found)


def _whole(resolved: Resolved, part: ResolvedPart, levels: Levels) -> Iterator[Slot]:
    """Every tensor of the module, from whole models."""
    span = part.spans[0]
    stacks = stacks_of(resolved.base.tensors)
    for name, spec in resolved.base.tensors.items():
        if part.module is None or resolved.modules.of(name) == part.module:
            place = layer_name(name)
            position = Position(name, place.layer, stacks[place.stack]) if place else Position(name, None, 0)
            sources = tuple(_source(resolved, use, name, spec, position) for use in span.uses)
            yield Slot(
                name=name,
                base=spec,
                position=position,
                sources=sources,
                levels=levels,
                based=span.based,
                where=span.where,
                dtype=span.base.lasting.get(name),
            )


def _source(resolved: Resolved, use: Use, name: str, base: StoredTensor, position: Position) -> SlotSource:
    """What a source changes in a slot, by the name the tensor has in it."""
    source = resolved.sources[use.source]
    full: StoredTensor | None = source.model.tensors.get(name) if source.model else None
    lora, added = None, None
    if source.adapter:
        lora, added = source.adapter.factors.get(name), source.adapter.added.get(name)
        full = source.adapter.saved.get(name, full)
    return SlotSource(
        source=use.source,
        full=None if full == base else full,
        lora=lora,
        added=added,
        levels=(use.parameters,),
        position=replace(position, name=name),
    )


class _Stack:
    """The slots of a module made of slices. What does not fit goes to ``problems``.

    ``free`` are the tensors with a row for each token, where the recipe says what becomes of the vocabulary.
    """

    def __init__(self, resolved: Resolved, part: ResolvedPart, problems: list[Problem], free: frozenset[str]) -> None:
        self._resolved, self._part, self._problems, self._free = resolved, part, problems, free

    def slots(self, levels: Levels) -> list[Slot]:
        stacks = _stacks(self._resolved, self._part)
        if len(stacks) != 1:
            self._problems.append(_not_one_stack(self._resolved, self._part, list(stacks)))
            return []
        (stack,) = stacks
        fitting = [self._fits(span, stack) for span in self._part.spans]
        if not all(fitting):
            return []
        first, last = self._part.spans[0], self._part.spans[-1]
        slots = [slot for slot in self._outside(first, stack, levels) if comes_before_layers(slot.name)]
        depth, parts = 0, 0
        for span in self._part.spans:
            layers = _by_layer(span.base, stack)
            for index in range(span.count or 0):
                parts += len(layers[span.first + index]) * (1 + len(span.uses))
                if parts > resolving.MAX_PARTS:
                    raise resolving.too_many_parts()
                for name, spec in layers[span.first + index].items():
                    slots.append(self._layered(span, name, spec, index, depth + index, levels))
            depth += span.count or 0
        slots.extend(slot for slot in self._outside(last, stack, levels) if not comes_before_layers(slot.name))
        self._check_shapes(slots, stack)
        return slots

    def _fits(self, span: Span, stack: str) -> bool:
        """Every range lies within its model's layers, and one config describes the model and the result."""
        before = len(self._problems)
        models = {span.where: (span.base, span.first)}
        for use in span.uses:
            if (model := self._resolved.sources[use.source].model) is not None:
                models[use.where] = (model, use.first)
        base = self._resolved.base
        for where, (model, start) in models.items():
            layers = stacks_of(model.tensors).get(stack)
            stop = start + (span.count or 0)
            if layers is None:
                message = f"{model.reference} has no layers called {stack}; slices are of one architecture."
                self._add("model_mismatch", message, where)
            elif stop > layers:
                message = f"{model.reference} has {layers} layers, counted from 0; [{start}, {stop}] ends beyond them."
                self._add("recipe_invalid", message, f"{where}.layer_range")
            for key in CONFIGURED:
                if model.config.get(key) != base.config.get(key):
                    message = (
                        f"{key} is {model.config.get(key)!r} in {model.reference} and {base.config.get(key)!r} in "
                        f"{base.reference}; one config cannot describe both."
                    )
                    self._add("model_mismatch", message, where)
        return len(self._problems) == before

    def _outside(self, span: Span, stack: str, levels: Levels) -> Iterator[Slot]:
        """The tensors outside the layers, of the sources of one span."""
        for name, spec in span.base.tensors.items():
            place = layer_name(name)
            if (place is None or place.stack != stack) and self._owns(name):
                position = Position(name, None, 0)
                yield self._slot(span, spec, position, [(use, name) for use in span.uses], levels)

    def _layered(self, span: Span, name: str, spec: StoredTensor, index: int, number: int, levels: Levels) -> Slot:
        """A tensor of the layer ``index`` of a span, which is the result's layer ``number``."""
        place = layer_name(name)
        assert place is not None
        position = Position(place.at(number), index, span.count or 0)
        return self._slot(span, spec, position, [(use, place.at(use.first + index)) for use in span.uses], levels)

    def _slot(
        self, span: Span, spec: StoredTensor, position: Position, uses: Sequence[tuple[Use, str]], levels: Levels
    ) -> Slot:
        for use, name in uses:
            model = self._resolved.sources[use.source].model
            own = model.tensors.get(name) if model else spec
            if own is None:
                message = f"{model.reference if model else ''} lacks {name}, which this slice needs."
                self._add("model_mismatch", message, use.where)
            elif not self._alike(name, own, spec):
                message = (
                    f"{name} is {own.dtype} {list(own.shape)} there, and what it is merged with "
                    f"{spec.dtype} {list(spec.shape)}; sources of one slice have equal shapes."
                )
                self._add("model_mismatch", message, use.where)
        sources = tuple(_source(self._resolved, use, name, spec, position) for use, name in uses)
        return Slot(
            name=position.name,
            base=spec,
            position=position,
            sources=sources,
            levels=(span.parameters, *levels),
            based=span.based,
            where=span.where,
            dtype=span.base.lasting.get(spec.name),
        )

    def _alike(self, name: str, own: StoredTensor, spec: StoredTensor) -> bool:
        shapes = own.shape == spec.shape or (name in self._free and own.shape[1:] == spec.shape[1:])
        return shapes and (own.dtype in FLOATS) == (spec.dtype in FLOATS)

    def _check_shapes(self, slots: Sequence[Slot], stack: str) -> None:
        """Layers of the result have the shapes that layers have in the model whose config describes them."""
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, spec in self._resolved.base.tensors.items():
            place = layer_name(name)
            shapes.setdefault(place.rest if place and place.stack == stack else name, set()).add(spec.shape)
        for slot in slots:
            place = layer_name(slot.name)
            known = shapes.get(place.rest if place and place.stack == stack else slot.name)
            if slot.name not in self._free and (known is None or slot.base.shape not in known):
                reference = self._resolved.base.reference
                sizes = " or ".join(str(list(shape)) for shape in sorted(known)) if known else "no such tensor"
                message = (
                    f"{slot.name} is {list(slot.base.shape)} there, and {reference}, whose config describes the "
                    f"result, has {sizes}; slices are of models of one size."
                )
                self._add("model_mismatch", message, slot.where)
        missing = [name for name in shapes if name in self._resolved.base.tensors and self._owns(name)]
        if not any(problem.code == "model_mismatch" for problem in self._problems):
            self._check_nothing_lost(missing, slots, "take the first and the last slice from models that have it")
            self._check_nothing_lost(self._of_first_layer(stack), slots, "begin with the first layer of a model")

    def _of_first_layer(self, stack: str) -> list[str]:
        """What the first layer has for all, as T5's has the bias of positions: all that the others have, and more."""
        layers = _by_layer(self._resolved.base, stack)
        rests = {
            layer: {place.rest for name in own if (place := layer_name(name)) is not None}
            for layer, own in layers.items()
        }
        first = rests.pop(0, set())
        others = set().union(*rests.values())
        return [f"{stack}.0.{rest}" for rest in sorted(first - others)] if others and others < first else []

    def _check_nothing_lost(self, names: Sequence[str], slots: Sequence[Slot], advice: str) -> None:
        have = {slot.name for slot in slots}
        lost = [name for name in names if name not in have]
        if lost:
            message = (
                f"The result would lack {lost[0]}, which {self._resolved.base.reference} has; {advice}, or name "
                "another base_model."
            )
            self._add("model_mismatch", message, self._part.spans[-1].where)

    def _owns(self, name: str) -> bool:
        return self._part.module is None or self._resolved.modules.of(name) == self._part.module

    def _add(self, code: str, message: str, where: str) -> None:
        self._problems.append(Problem(code=code, message=message, where=where))


def _stacks(resolved: Resolved, part: ResolvedPart) -> Mapping[str, int]:
    """The stacks of layers of a module, in the base."""
    names = resolved.base.tensors
    return stacks_of(name for name in names if part.module is None or resolved.modules.of(name) == part.module)


def _by_layer(model: ModelSource, stack: str) -> Mapping[int, Mapping[str, StoredTensor]]:
    """The tensors of each layer of a stack."""
    found: dict[int, dict[str, StoredTensor]] = defaultdict(dict)
    for name, spec in model.tensors.items():
        place = layer_name(name)
        if place is not None and place.stack == stack:
            found[place.layer][name] = spec
    return found


def _not_one_stack(resolved: Resolved, part: ResolvedPart, stacks: Sequence[str]) -> Problem:
    where = part.spans[0].where.removesuffix("[0].sources") if part.spans else "slices"
    if not stacks:
        place = f"its module {part.module}" if part.module else "it"
        message = f"{resolved.base.reference} has no layers in {place} that slices could take; use `models`."
        return Problem(code="recipe_invalid", message=message, where=where)
    names = list(dict.fromkeys(map(resolved.modules.of, resolved.base.tensors)))
    message = (
        f"{resolved.base.reference} has several stacks of layers, {', '.join(stacks)}; say which by `modules`: "
        f"{', '.join(names)}."
    )
    return Problem(code="recipe_invalid", message=message, where=where)
