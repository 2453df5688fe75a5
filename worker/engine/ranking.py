"""Exact order statistics over a tensor: which values of a score are the k largest, and what the k-th is.

Two sweeps find the bits of a threshold from histograms; a third shares equal values out to the lowest flat indices,
where only some of them belong to the k. Counts are whole numbers, so nothing depends on the order of threads.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, LifoQueue

import numpy as np
import torch

from worker.engine.blocks import Block
from worker.engine.kernels.reference import magnitudes, survivors
from worker.engine.kernels.selection import coarse_bin, fine_threshold
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS, KEEP_NONE, Trim
from worker.engine.reductions import Values
from worker.engine.views import BlockView, TensorPass

ALL_EQUALS = (1 << 31) - 1  # no block has more values


@dataclass(slots=True, kw_only=True)
class Cut:
    """What is among the k largest of one tensor. ``equals`` is per block, or the same in all; ``threshold`` bits."""

    threshold: int
    equals: array[int] | int
    rescale: float = 1.0

    def at(self, block: Block) -> Trim:
        equals = self.equals if isinstance(self.equals, int) else self.equals[block.index]
        return Trim(threshold=self.threshold, equals=equals, rescale=self.rescale)

    def holds(self, block: Block, score: torch.Tensor) -> torch.Tensor:
        """Which values of a block are among the k, bool (n,)."""
        if self.equals == ALL_EQUALS:
            return magnitudes(score) >= self.threshold
        return survivors(score, self.at(block))

    @property
    def value(self) -> float:
        """The k-th largest value itself."""
        return float(np.int32(self.threshold).view(np.float32))


def largest(tensor: TensorPass, scores: Values, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """The k largest of each score, for each k of ``counts``: one list a score.

    ``scores`` gives those of a block, float32 (M, n), none below 0; k is 0 up to the tensor's number of values.
    """
    searches = [[_Search(k=k, cut=Cut(threshold=KEEP_NONE.threshold, equals=0)) for k in own] for own in counts]
    if any(search.k > 0 for own in searches for search in own):
        _find(tensor, scores, searches)
    return [[search.cut for search in own] for own in searches]


class Counts:
    """One set of histograms a thread, added up at the end: whole numbers, so any order gives the same sums."""

    def __init__(self, rows: int, bins: int) -> None:
        self._shape = (rows, bins)
        self._free: LifoQueue[torch.Tensor] = LifoQueue()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[torch.Tensor]:
        try:
            counts = self._free.get_nowait()
        except Empty:
            counts = torch.zeros(self._shape, dtype=torch.int64)
        yield counts
        self._free.put(counts)

    def total(self) -> torch.Tensor:
        total = torch.zeros(self._shape, dtype=torch.int64)
        while not self._free.empty():
            total += self._free.get()
        return total


@dataclass(slots=True, kw_only=True)
class _Search:
    k: int
    cut: Cut
    prefix: int = 0
    k_left: int = 0
    equals_left: int = 0


def _find(tensor: TensorPass, scores: Values, searches: Sequence[Sequence[_Search]]) -> None:
    wanted = [(row, search) for row, own in enumerate(searches) for search in own if search.k > 0]

    coarse = _histograms(tensor, scores, [(row, None) for row in range(len(searches))])
    for row, search in wanted:
        search.prefix, search.k_left = coarse_bin(coarse[row], search.k)

    fine = _histograms(tensor, scores, [(row, search.prefix) for row, search in wanted])
    divided = []
    for slot, (row, search) in enumerate(wanted):
        threshold, kept, present = fine_threshold(fine[slot], search.prefix, search.k_left)
        search.cut = Cut(threshold=threshold, equals=ALL_EQUALS)
        if kept < present:
            search.equals_left = kept
            search.cut.equals = array("q")
            divided.append((row, search))
    if divided:
        _divide_equals(tensor, scores, divided)


def _histograms(tensor: TensorPass, scores: Values, wanted: Sequence[tuple[int, int | None]]) -> torch.Tensor:
    """int64 (wanted, bins): of a score's coarse bins, or of the fine ones within a prefix."""
    counts = Counts(len(wanted), COARSE_BINS if wanted[0][1] is None else FINE_BINS)

    def count(view: BlockView) -> None:
        values = scores(view)
        with counts.borrow() as held:
            for slot, (row, prefix) in enumerate(wanted):
                tensor.kernels.histogram(values[row], held[slot], prefix)

    for _ in tensor.each(count):
        pass
    return counts.total()


def _divide_equals(tensor: TensorPass, scores: Values, divided: Sequence[tuple[int, _Search]]) -> None:
    def count(view: BlockView) -> list[int]:
        values = scores(view)
        return [tensor.kernels.count_equal(values[row], search.cut.threshold) for row, search in divided]

    for found in tensor.each(count):
        for (_, search), present in zip(divided, found, strict=True):
            kept = min(search.equals_left, present)
            search.equals_left -= kept
            assert isinstance(search.cut.equals, array)
            search.cut.equals.append(kept)
