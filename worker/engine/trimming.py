"""The passes before a merge: which values of each source survive the trim, and the model's majority sign.

A scope is the tensors that one threshold spans: one tensor, or all of the model in the order of their names. It is
swept a few times, each time block by block with Δ formed or reused bit for bit; nothing is ever concatenated.
Whatever order threads finish in, counts are whole numbers and float sums are added up in block order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import torch

from app.planning.plan import Contribution, TensorPlan
from worker.engine.blocks import Block
from worker.engine.bracket import SMALL, Bracket, Collected, Magnitudes, Sample, bracket
from worker.engine.deltas import TensorDeltas
from worker.engine.kernels.selection import coarse_bin, fine_threshold
from worker.engine.kernels.signature import (
    COARSE_BINS,
    FINE_BINS,
    KEEP_ALL,
    KEEP_NONE,
    Delta,
    Rule,
    Trim,
)
from worker.engine.methods import VoteMethod
from worker.engine.ranking import ALL_EQUALS, Counts, Cut
from worker.engine.views import Resources

Result = TypeVar("Result")

_SAMPLE_COLUMNS = 64  # of each of a group's rows; a scope of many tensors takes fewer of each


@dataclass(slots=True)
class _Search:
    """Looks for one source's threshold over a scope: the ``k``-th largest of ``values`` magnitudes."""

    slot: int  # its row in the counts
    values: int = 0
    k: int = 0
    prefix: int = 0
    k_left: int = 0
    threshold: int = -1
    equals_kept: int = 0
    equals_present: int = 0
    equals: dict[str, array[int]] = field(default_factory=dict)  # by tensor, where some must go
    rescale: float = 1.0

    @property
    def open(self) -> bool:
        return 0 < self.k < self.values

    @property
    def sought(self) -> bool:
        return self.open and self.threshold < 0

    @property
    def divides_equals(self) -> bool:
        return self.open and self.equals_kept < self.equals_present and not self.equals

    def trim(self, tensor: TensorPlan, *, rescale: bool) -> Cut | None:
        """What is known so far, for one tensor."""
        if self.k >= self.values:
            return None
        if self.k <= 0:
            return Cut(threshold=KEEP_NONE.threshold, equals=0)
        equals = self.equals.get(tensor.name, ALL_EQUALS)
        factor = self.rescale if rescale else 1.0
        return Cut(threshold=self.threshold, equals=equals, rescale=factor)


Pulse: TypeAlias = Callable[[TensorPlan, Block], None]  # told of each block done
TensorTrims: TypeAlias = Sequence[Cut | None]  # one a contribution; None keeps everything


def trims_at(trims: TensorTrims, block: Block) -> list[Trim]:
    return [KEEP_ALL if trim is None else trim.at(block) for trim in trims]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Sweeps over Δ. ``pulse`` is called on the caller's thread after each block of a sweep, in block order."""

    method: VoteMethod
    resources: Resources
    sources: int  # in the recipe

    def sweep(
        self,
        scope: Sequence[TensorPlan],
        work: Callable[[TensorPlan, Block, Sequence[Delta]], Result],
        pulse: Pulse,
        wanted: Callable[[TensorPlan], Iterable[int]] | None = None,
    ) -> Iterator[tuple[TensorPlan, Block, Result]]:
        """``work`` on the Δ of every block of every tensor, side by side; results in order.

        ``wanted`` says which contributions of a tensor are given, in which order; without it all are.
        """
        for tensor in scope:
            opened = self.open(tensor)
            chosen = None if wanted is None else list(wanted(tensor))

            def of_block(
                block: Block,
                tensor: TensorPlan = tensor,
                opened: TensorDeltas = opened,
                chosen: Sequence[int] | None = chosen,
            ) -> tuple[Block, Result]:
                with self.resources.scratches.borrow() as scratch:
                    return block, work(tensor, block, opened.operands(block, scratch, chosen))

            for block, result in self.resources.crew.in_order(of_block, opened.blocks):
                pulse(tensor, block)
                yield tensor, block, result

    def open(self, tensor: TensorPlan) -> TensorDeltas:
        """The tensor's task vectors, scaled first where the method wants that."""
        weights = [1.0] * len(tensor.contributions)
        if self.method.needs(tensor).prescale:
            weights = [contribution.parameters["weight"] for contribution in tensor.contributions]
        return self.resources.deltas.open(tensor, weights)

    def select(self, scope: Sequence[TensorPlan], pulse: Pulse) -> dict[str, TensorTrims]:
        """The exact trim of every tensor in ``scope``, by name.

        One sweep collects the magnitudes near each threshold, where a sample places it. Where that misses come up to
        three more: two levels of the threshold's bits, and equal magnitudes where only some of them stay (the lowest
        flat indices do). The last sums the L1 norms where ``rescale`` needs them.
        """
        searches = self._searches(scope)
        if any(search.open for search in searches.values()):
            self._collect(scope, searches, pulse)
            if any(search.sought for search in searches.values()):
                self._find_thresholds(scope, searches, pulse)
            if any(search.divides_equals for search in searches.values()):
                self._divide_equals(scope, searches, pulse)
            if any(self.method.needs(tensor).rescale for tensor in scope):
                self._find_rescales(scope, searches, pulse)
        return {tensor.name: _trims(tensor, searches, rescale=self.method.needs(tensor).rescale) for tensor in scope}

    def balance(self, tensor: TensorPlan, trims: TensorTrims, pulse: Pulse) -> int:
        """The sum of the elected signs of a tensor: its part in the model's majority sign."""
        weights, rule = self.method.weights(tensor), self.rule(tensor)

        def elect(_tensor: TensorPlan, block: Block, deltas: Sequence[Delta]) -> int:
            return self.resources.kernels.elected_balance(deltas, trims_at(trims, block), weights, rule)

        return sum(balance for _, _, balance in self.sweep([tensor], elect, pulse))

    def trims_of(self, tensor: TensorPlan, pulse: Pulse) -> TensorTrims:
        """The trims of a tensor whose thresholds, if any, span only itself."""
        if self.method.needs(tensor).trim == "none":
            return [None] * len(tensor.contributions)
        return self.select([tensor], pulse)[tensor.name]

    def rule(self, tensor: TensorPlan, zero_sign: Literal[1, -1] = 1) -> Rule:
        return self.method.rule(tensor, zero_sign, sources=self.sources)

    def _searches(self, scope: Sequence[TensorPlan]) -> dict[int, _Search]:
        """By source: those that change anything in the scope; n is the size of the tensors each one touches."""
        searches: dict[int, _Search] = {}
        for tensor in scope:
            for contribution in filter(_changes, tensor.contributions):
                search = searches.setdefault(contribution.source, _Search(slot=len(searches)))
                search.values += math.prod(tensor.shape)
        for tensor in scope:
            for contribution in filter(_changes, tensor.contributions):
                search = searches[contribution.source]
                search.k = self.method.keep_count(tensor, contribution, search.values)
        return searches

    def _collect(self, scope: Sequence[TensorPlan], searches: dict[int, _Search], pulse: Pulse) -> None:
        """Find the thresholds that lie in their brackets; the others stay sought."""
        brackets = self._brackets(scope, searches)
        if not brackets:
            return
        collections = {slot: Collected(len(brackets)) for slot in brackets}

        def bracketed(tensor: TensorPlan) -> dict[int, _Search]:
            return {index: search for index, search in _open_searches(tensor, searches) if search.slot in brackets}

        def collect(tensor: TensorPlan, block: Block, deltas: Sequence[Delta]) -> list[tuple[int, int, Magnitudes]]:
            slots = [search.slot for search in bracketed(tensor).values()]
            if not slots:
                return []
            own = [brackets[slot] for slot in slots]
            room = torch.empty(len(slots), min(block.size, max(SMALL, block.size // 4)), dtype=torch.int32)
            counts = self.resources.kernels.collect(deltas, own, room)
            most = max(inside for _, inside in counts)
            if most > room.shape[1]:
                room = torch.empty(len(slots), most, dtype=torch.int32)
                counts = self.resources.kernels.collect(deltas, own, room)
            return [
                (slot, above, row[:inside].copy())
                for slot, (above, inside), row in zip(slots, counts, room.numpy(), strict=True)
            ]

        for tensor, _, found in self.sweep(scope, collect, pulse, bracketed):
            for slot, above, inside in found:
                collections[slot].add(tensor.name, above, inside)
        for search in searches.values():
            place = collections[search.slot].largest(search.k) if search.slot in collections else None
            if place is not None:
                search.threshold, search.equals_kept, search.equals_present = place
                if search.divides_equals:
                    search.equals = collections[search.slot].shared(search.threshold, search.equals_kept)

    def _brackets(self, scope: Sequence[TensorPlan], searches: dict[int, _Search]) -> dict[int, Bracket]:
        """By slot, where the thresholds lie in all likelihood. Those that a sample does not place are left out."""
        wanted = {search.slot: search for search in searches.values() if search.open}
        samples: dict[int, list[Sample]] = {slot: [] for slot in wanted}
        columns = max(2, _SAMPLE_COLUMNS // len(scope))
        for tensor in scope:
            large = [item for item in _open_searches(tensor, searches) if item[1].values > SMALL]
            if not large:
                continue
            opened = self.open(tensor)

            def sample(
                item: tuple[int, _Search], tensor: TensorPlan = tensor, opened: TensorDeltas = opened
            ) -> tuple[int, Sample]:
                with self.resources.scratches.borrow() as scratch:
                    values = opened.sample(item[0], columns, scratch)
                return item[1].slot, Sample(values, math.prod(tensor.shape))

            for slot, found in self.resources.crew.in_order(sample, large):
                samples[slot].append(found)

        def place(slot: int) -> tuple[int, Bracket | None]:
            return slot, bracket(samples[slot], wanted[slot].k, wanted[slot].values)

        placed = self.resources.crew.in_order(place, wanted)
        return {slot: found for slot, found in placed if found is not None}

    def _find_thresholds(self, scope: Sequence[TensorPlan], searches: dict[int, _Search], pulse: Pulse) -> None:
        coarse = self._histograms(scope, searches, COARSE_BINS, pulse)
        sought = list(filter(_is_sought, searches.values()))
        for search in sought:
            search.prefix, search.k_left = coarse_bin(coarse[search.slot], search.k)
        fine = self._histograms(scope, searches, FINE_BINS, pulse)
        for search in sought:
            search.threshold, search.equals_kept, search.equals_present = fine_threshold(
                fine[search.slot], search.prefix, search.k_left
            )

    def _histograms(
        self,
        scope: Sequence[TensorPlan],
        searches: dict[int, _Search],
        bins: int,
        pulse: Pulse,
    ) -> torch.Tensor:
        """int64 (sources, bins)."""
        counts = Counts(len(searches), bins)

        def sought(tensor: TensorPlan) -> dict[int, _Search]:
            return {index: search for index, search in _open_searches(tensor, searches) if search.sought}

        def count(tensor: TensorPlan, _block: Block, deltas: Sequence[Delta]) -> None:
            with counts.borrow() as held:
                for delta, search in zip(deltas, sought(tensor).values(), strict=True):
                    prefix = None if bins == COARSE_BINS else search.prefix
                    self.resources.kernels.histogram(delta, held[search.slot], prefix)

        for _ in self.sweep(scope, count, pulse, sought):
            pass
        return counts.total()

    def _divide_equals(self, scope: Sequence[TensorPlan], searches: dict[int, _Search], pulse: Pulse) -> None:
        left = {search.slot: search.equals_kept for search in searches.values() if search.divides_equals}

        def dividing(tensor: TensorPlan) -> dict[int, _Search]:
            return {index: search for index, search in _open_searches(tensor, searches) if search.slot in left}

        def count(tensor: TensorPlan, _block: Block, deltas: Sequence[Delta]) -> list[tuple[_Search, int]]:
            return [
                (search, self.resources.kernels.count_equal(delta, search.threshold))
                for delta, search in zip(deltas, dividing(tensor).values(), strict=True)
            ]

        for tensor, _, found in self.sweep(scope, count, pulse, dividing):
            for search, present in found:
                kept = min(left[search.slot], present)
                left[search.slot] -= kept
                everything = 0 < kept == present  # then nobody need look for the last of them
                search.equals.setdefault(tensor.name, array("q")).append(ALL_EQUALS if everything else kept)

    def _find_rescales(self, scope: Sequence[TensorPlan], searches: dict[int, _Search], pulse: Pulse) -> None:
        before = dict.fromkeys(searches, 0.0)
        after = dict.fromkeys(searches, 0.0)

        def norms(tensor: TensorPlan, block: Block, deltas: Sequence[Delta]) -> list[tuple[int, float, float]]:
            found = []
            for index, search in _open_searches(tensor, searches):
                trim = search.trim(tensor, rescale=False)
                assert trim is not None  # an open search trims
                everything = self.resources.kernels.kept_l1(deltas[index], KEEP_ALL)
                kept = self.resources.kernels.kept_l1(deltas[index], trim.at(block))
                found.append((tensor.contributions[index].source, everything, kept))
            return found

        for _, _, sums in self.sweep(scope, norms, pulse):
            for source, everything, kept in sums:
                before[source] += everything
                after[source] += kept
        for source, search in searches.items():
            if search.open and after[source] > 0:
                search.rescale = before[source] / after[source]


def _changes(contribution: Contribution) -> bool:
    """A source without δ here is all zeros: it has nothing to trim and is no part of a task vector."""
    return contribution.changes


def _is_sought(search: _Search) -> bool:
    return search.sought


def _open_searches(tensor: TensorPlan, searches: dict[int, _Search]) -> Iterator[tuple[int, _Search]]:
    """The tensor's contributions whose threshold is looked for: their index in the tensor, and the search."""
    for index, contribution in enumerate(tensor.contributions):
        if _changes(contribution) and searches[contribution.source].open:
            yield index, searches[contribution.source]


def _trims(tensor: TensorPlan, searches: dict[int, _Search], *, rescale: bool) -> TensorTrims:
    return [
        searches[contribution.source].trim(tensor, rescale=rescale) if _changes(contribution) else None
        for contribution in tensor.contributions
    ]
