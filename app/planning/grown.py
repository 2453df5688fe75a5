"""Vocabularies that an adapter grew: it was trained on more tokens than the base has, and saved rows for all of them.

The base has zeros where it has no such token, and so does every source but the one that brings the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from app.errors import MergeyardError
from app.planning.layout import Slot
from app.planning.matching import is_vocabulary
from app.planning.resolving import Resolved
from app.sources.source import GatheredTensor, Run, StoredTensor


def grow(slots: Sequence[Slot], resolved: Resolved) -> tuple[Slot, ...]:
    """The slots with every embedding and head as long as the longest of its sources.

    Raises:
        MergeyardError: `adapter_vocabulary` where it is not plain what the new rows mean: several sources bring their
            own, or one of the tensors with a row for each token did not grow.
    """
    found = tuple(_grown(slot, resolved) for slot in slots)
    sizes = {slot.name: slot.base.shape[0] for slot in found if is_vocabulary(slot.name)}
    changed = [slot.name for slot, before in zip(found, slots, strict=True) if slot is not before]
    if changed and len(set(sizes.values())) > 1:
        smallest = min(sizes, key=lambda name: sizes[name])
        message = (
            f"{changed[0]} grew to {sizes[changed[0]]} tokens and {smallest} has {sizes[smallest]}; save both with the "
            "adapter (modules_to_save), or it cannot be loaded."
        )
        raise MergeyardError("adapter_vocabulary", message, where="models")
    return found


def vocabulary_size(before: Sequence[Slot], after: Sequence[Slot]) -> int | None:
    """How many rows the result has for tokens, where they are not the base's."""
    return next((slot.base.shape[0] for old, slot in zip(before, after, strict=True) if slot is not old), None)


def _grown(slot: Slot, resolved: Resolved) -> Slot:
    rows = slot.base.shape[0] if slot.base.shape else 0
    longer = [item for item in slot.sources if item.full is not None and item.full.shape[0] > rows]
    if not slot.base.shape or not longer:
        return slot
    references = [" or ".join(resolved.sources[item.source].canonical.values()) for item in longer]
    if len({item.full for item in longer}) > 1:
        sizes = {item.full.shape[0] for item in longer if item.full is not None}
        what = "to different sizes" if len(sizes) > 1 else "by rows that need not be the same tokens"
        message = (
            f"{' and '.join(dict.fromkeys(references))} grew {slot.name} {what}; merge one of them, or let PEFT merge "
            "each into a model of its own, and merge those with `tokenizer_source: union`."
        )
        raise MergeyardError("adapter_vocabulary", message, where=resolved.sources[longer[1].source].where)
    assert longer[0].full is not None
    size = longer[0].full.shape[0]
    return replace(
        slot,
        base=_extended(slot.base, size),
        sources=tuple(
            item if item.full is None else replace(item, full=_extended(item.full, size)) for item in slot.sources
        ),
    )


def _extended(tensor: StoredTensor, rows: int) -> StoredTensor:
    own = tensor.shape[0]
    if own == rows:
        return tensor
    runs = tensor.runs if isinstance(tensor, GatheredTensor) else (Run(start=0, count=own, parts=((tensor, 0),)),)
    return GatheredTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=(rows, *tensor.shape[1:]),
        runs=(*runs, Run(start=own, count=rows - own, parts=())),
    )
