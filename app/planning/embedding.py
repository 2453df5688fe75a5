"""Which row of which model's embedding each token of the result takes.

As in mergekit every model's embedding and head are put into the result's order before they are merged. A token that a
model has takes its own row there; one that it lacks takes the row the recipe names, else the base's, else the only
model's that has it, else the mean of those that have it, else zeros. The rows of ``pad_to_multiple_of`` are the mean of
all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app.errors import MergeyardError
from app.planning.layout import Slot
from app.planning.resolving import Resolved
from app.planning.vocabulary import Holder, Vocabulary, reference_of, row_named
from app.recipe.tokenizer import TokenSource
from app.sources.source import StoredTensor, TensorSpec, assembled, joined, row_of

Parts = tuple[tuple[int, int], ...]  # (which of the models, its row); several: their mean; none: zeros


def align(slots: Sequence[Slot], vocabulary: Vocabulary, resolved: Resolved) -> tuple[Slot, ...]:
    """The slots with every vocabulary tensor in the result's order.

    Raises MergeyardError `adapter_vocabulary` where a source adapts such a tensor by factors and its rows move,
    `token_not_found`, `not_supported` (a slice that starts from a model that is no source of it).
    """
    tables = _Tables(vocabulary)
    return tuple(tables.aligned(slot, resolved) if slot.name in vocabulary.tensors else slot for slot in slots)


@dataclass(slots=True)
class _Tables:
    """Which rows each model's table takes; the same for every tensor in which the same models have a part."""

    vocabulary: Vocabulary
    _defaults: dict[tuple[tuple[str, ...], str], list[Parts]] = field(default_factory=dict)
    _made: dict[tuple[tuple[str, ...], str, str], list[tuple[int, int, Parts]]] = field(default_factory=dict)

    def aligned(self, slot: Slot, resolved: Resolved) -> Slot:
        base = self._owner(slot, resolved)
        given = [reference_of(resolved.sources[item.source]) for item in slot.sources]
        votes = slot.based or base in given or not given
        voters = tuple(dict.fromkeys(([base] if votes else []) + given))
        specs: dict[str, StoredTensor] = {base: slot.base}
        keys = []
        for item in slot.sources:
            source = resolved.sources[item.source]
            keys.append(reference_of(source))
            specs[keys[-1]] = item.full or slot.base
            if (item.lora is not None or item.added is not None) and not self._stays(voters, base, keys[-1]):
                message = (
                    f"{keys[-1]} adapts {slot.name} by factors, whose rows cannot be put into another vocabulary; "
                    "merge the adapter into its model first, or leave the tokenizer keys out."
                )
                raise MergeyardError("adapter_vocabulary", message, where=source.where)
        return replace(
            slot,
            dtype=slot.dtype or slot.base.dtype,
            base=self._tensor(slot.base, voters, base, base, specs),
            sources=tuple(
                item if item.full is None else replace(item, full=self._tensor(item.full, voters, base, key, specs))
                for item, key in zip(slot.sources, keys, strict=True)
            ),
        )

    def _stays(self, voters: tuple[str, ...], base: str, key: str) -> bool:
        """Whether every row of a source stays where it is, and none of them goes to another model."""
        vocabulary = self.vocabulary
        unmoved = [(0, vocabulary.holders[key].rows, ((len(voters), 0),))]
        lends = vocabulary.missing != "base" or any(source.model == key for source, _ in vocabulary.settings.values())
        return not (vocabulary.padding or lends) and all(self._runs(voters, base, at) == unmoved for at in (base, key))

    def _tensor(
        self, own: StoredTensor, voters: tuple[str, ...], base: str, key: str, specs: Mapping[str, StoredTensor]
    ) -> StoredTensor:
        order = [specs[name] for name in (*voters, key)]
        runs = self._runs(voters, base, key)
        placed = [(start, count, tuple((order[at], row) for at, row in parts)) for start, count, parts in runs]
        return assembled(own.name, _stored(placed), own.shape[1:], self.vocabulary.padding)

    def _runs(self, voters: tuple[str, ...], base: str, key: str) -> list[tuple[int, int, Parts]]:
        if (voters, base, key) not in self._made:
            vocabulary = self.vocabulary
            holder, itself = vocabulary.holders[key], len(voters)
            if (voters, base) not in self._defaults:
                self._defaults[voters, base] = _defaults(vocabulary, voters, base)
            rows = list(self._defaults[voters, base])
            for token, index in vocabulary.ids.items():
                own = holder.row(token)
                if own is not None and not vocabulary.forced(token):
                    rows[index] = ((itself, own),)
            self._made[voters, base, key] = joined(rows)
        return self._made[voters, base, key]

    def _owner(self, slot: Slot, resolved: Resolved) -> str:
        """The model that a slot starts from: a slice may have another base than the recipe."""
        spec, _ = row_of(slot.base, 0)[0]
        if spec.file in resolved.base.files:
            return self.vocabulary.base
        for source in resolved.sources:
            if source.model and not source.adapter and spec.file in source.model.files:
                return reference_of(source)
        message = f"{slot.name} starts from a model that is only a slice's base; list it as a source of the slice too."
        raise MergeyardError("not_supported", message, where="tokenizer")


def _stored(
    runs: Iterable[tuple[int, int, tuple[tuple[StoredTensor, int], ...]]],
) -> Iterable[tuple[int, int, tuple[tuple[TensorSpec, int], ...]]]:
    """The same rows in terms of stored tensors: an adapter's trained tokens make a tensor that is gathered itself."""
    for start, count, parts in runs:
        plain = tuple((spec, row) for spec, row in parts if isinstance(spec, TensorSpec))
        if len(plain) == len(parts):
            yield start, count, plain
            continue
        rows = (tuple(part for spec, row in parts for part in row_of(spec, row + index)) for index in range(count))
        yield from ((start + first, length, own) for first, length, own in joined(rows))


def _defaults(vocabulary: Vocabulary, voters: Sequence[str], base: str) -> list[Parts]:
    """By id, what a model takes for a token that it lacks. Ids that no token has stay what they were."""
    holders = [vocabulary.holders[voter] for voter in voters]
    first = next(
        (at for at, holder in enumerate(holders) if holder.tokenizer.reference == vocabulary.tokenizer.reference), None
    )
    known = 0 if first is None else holders[first].rows
    rows: list[Parts] = [()] * vocabulary.size
    if first is not None:
        rows = [((first, index),) if index < known else () for index in range(vocabulary.size)]
    for token, index in vocabulary.ids.items():
        if token in vocabulary.settings:
            rows[index] = _named(token, vocabulary.settings[token][0], voters, holders)
        else:
            rows[index] = _unnamed(token, vocabulary, voters, base, holders)
    return rows


def _named(token: str, source: TokenSource, voters: Sequence[str], holders: Sequence[Holder]) -> Parts:
    """``source`` names a model by reference, and a token that it has."""
    if source.model is None:
        return ()
    if source.model not in voters:
        message = f"{source.model}, which `tokenizer.tokens` names, takes no part in the result's embedding."
        raise MergeyardError("token_not_found", message, where="tokenizer.tokens")
    at = voters.index(source.model)
    row = row_named(token, source, holders[at])
    assert row is not None  # plan_vocabulary has looked
    return ((at, row),)


def _unnamed(token: str, vocabulary: Vocabulary, voters: Sequence[str], base: str, holders: Sequence[Holder]) -> Parts:
    having = tuple((at, row) for at, holder in enumerate(holders) if (row := holder.row(token)) is not None)
    if len(having) > 1 and vocabulary.missing == "base":
        having = next(((part,) for part in having if voters[part[0]] == base), having)
    return having
