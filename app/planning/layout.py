"""Which tensors the result has and where each one's values come from: slots, before any parameter is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.planning.parameters import Levels
from app.planning.plan import LoraFactors, ScaledTensor
from app.planning.resolving import Resolved, ResolvedSource
from app.recipe import Recipe
from app.recipe.values import Position, layer_of
from app.sources.safetensors import FLOATS
from app.sources.source import ModelSource, StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSource:
    """One source in one slot: what it changes there (neither: nothing), and its own parameters."""

    source: int  # index into Resolved.sources
    full: StoredTensor | None
    lora: LoraFactors | None
    added: ScaledTensor | None
    levels: Levels

    @property
    def changes(self) -> bool:
        return self.full is not None or self.lora is not None or self.added is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor of the result: its name, the tensor it starts from, who may change it.

    ``levels`` are the parameters of the whole merge (of slice and module before them, where there are any);
    ``position`` decides gradients and filters. ``dtype`` is the stored type, where ``base`` is read as another.
    """

    name: str
    base: StoredTensor
    position: Position
    sources: tuple[SlotSource, ...]
    levels: Levels
    dtype: str | None = None

    @property
    def floating(self) -> bool:
        """Whole numbers are copied, never merged."""
        return self.base.dtype in FLOATS


def lay_out(recipe: Recipe, resolved: Resolved) -> tuple[Slot, ...]:
    """The slots in the order they are written: that of the base's files."""
    layers = _layer_count(resolved.base)
    return tuple(
        Slot(
            name=name,
            base=spec,
            position=Position(name, layer_of(name), layers),
            sources=tuple(_sources(resolved.sources, name)),
            levels=(recipe.parameters,),
        )
        for name, spec in resolved.base.tensors.items()
    )


def _sources(sources: Sequence[ResolvedSource], name: str) -> list[SlotSource]:
    found = []
    for index, source in enumerate(sources):
        full: StoredTensor | None = source.model.tensors.get(name) if source.model else None
        lora, added = None, None
        if source.adapter:
            lora, added = source.adapter.factors.get(name), source.adapter.added.get(name)
            full = source.adapter.saved.get(name, full)
        levels = (source.entry.parameters,)
        found.append(SlotSource(source=index, full=full, lora=lora, added=added, levels=levels))
    return found


def _layer_count(base: ModelSource) -> int:
    found = [layer for name in base.tensors if (layer := layer_of(name)) is not None]
    return max(found) + 1 if found else 0
