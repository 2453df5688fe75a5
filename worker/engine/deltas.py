"""Task vectors, block by block: what each source changes in the values of one block, in float32.

Every pass over a tensor sees the same bits: blocks are cut by shape alone, each product of a block is one
single-threaded BLAS call, and operands and results start at 64-byte boundaries or at the same offset from one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, LifoQueue

import torch

from app.errors import MergeyardError
from app.planning.plan import Contribution, TensorPlan
from app.sources.source import StoredTensor
from worker.engine.blocks import Block, cut, row_width
from worker.engine.reader import Reader

DELTA_BUDGET = 512_000_000  # bytes of Δ kept between passes; the planner's estimate counts on it
_ALIGNED = 16  # float32 values in 64 bytes
_CHEAP_RANK = 64  # up to here B·A of a block in the caches costs less than writing it to memory and reading it back


class Scratch:
    """Memory one block needs while it is worked on. Grows to the largest block seen and stays."""

    def __init__(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}

    def bytes(self, part: str, size: int) -> torch.Tensor:
        """uint8 (size,), uninitialised; the same memory each time for the same ``part``."""
        held = self._parts.get(part)
        if held is None or len(held) < size:
            held = self._parts[part] = torch.empty(size, dtype=torch.uint8)
        return held[:size]

    def floats(self, part: str, size: int) -> torch.Tensor:
        """float32 (size,), uninitialised."""
        return self.bytes(part, size * 4).view(torch.float32)


class ScratchPool:
    """As many Scratches as blocks are worked on at once."""

    def __init__(self) -> None:
        self._free: LifoQueue[Scratch] = LifoQueue()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Scratch]:
        try:
            scratch = self._free.get_nowait()
        except Empty:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            self._free.put(scratch)


@dataclass(frozen=True, slots=True)
class Factors:
    """A (r, in) and B (out, r) in float32, whole."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    transposed: bool


class TensorDeltas:
    """The task vectors of one tensor. Blocks may be asked for from several threads, each block by one at a time."""

    def __init__(
        self,
        tensor: TensorPlan,
        factors: Sequence[Factors | None],
        prescale: Sequence[float],
        reader: Reader,
        kept: torch.Tensor | None,
    ) -> None:
        """``prescale`` multiplies each δ; ``kept`` (float32, flat) holds what was formed, None keeps nothing."""
        self.tensor = tensor
        self.blocks = cut(tensor.shape)
        self._factors, self._prescale, self._reader = factors, prescale, reader
        self._width = row_width(tensor.shape)
        self._kept = kept
        self._formed = [False] * len(self.blocks)

    def forget(self) -> None:
        """Let go of the memory of what was formed: asked again, it is formed anew."""
        self._kept = None

    def of(self, block: Block, scratch: Scratch, wanted: Container[int] | None = None) -> torch.Tensor:
        """δ of every contribution over the block, float32 (N, n); valid until ``scratch`` is used again.

        Rows of contributions that are not ``wanted`` (None: all are) may hold anything.
        """
        sources = len(self.tensor.contributions)
        if self._kept is None:
            deltas = scratch.floats("deltas", sources * block.size).view(sources, block.size)
        else:
            # all blocks but the last have the size of the first
            place = block.index * kept_values(self.blocks[:1], sources)
            deltas = self._kept[place : place + sources * block.size].view(sources, block.size)
            if self._formed[block.index]:
                return deltas
        for index, contribution in enumerate(self.tensor.contributions):
            if wanted is None or index in wanted or self._kept is not None:
                self._form(index, contribution, block, deltas[index], scratch)
        self._formed[block.index] = self._kept is not None
        return deltas

    def _form(
        self, index: int, contribution: Contribution, block: Block, delta: torch.Tensor, scratch: Scratch
    ) -> None:
        factors = self._factors[index]
        if contribution.full is not None:
            self._difference(contribution.full, block, delta, scratch)
        if factors is not None:
            self._product(factors, block, delta, add=contribution.full is not None)
        elif contribution.full is None:
            delta.zero_()
        if self._prescale[index] != 1.0:
            delta.mul_(self._prescale[index])

    def _difference(self, full: StoredTensor, block: Block, delta: torch.Tensor, scratch: Scratch) -> None:
        base = scratch.floats("base", block.size)
        raw = scratch.bytes("raw", block.size * 8)
        self._reader.float32(full, block.start, block.stop, delta, raw)
        self._reader.float32(self.tensor.base, block.start, block.stop, base, raw)
        delta.sub_(base)

    def _product(self, factors: Factors, block: Block, delta: torch.Tensor, *, add: bool) -> None:
        first, last = block.start // self._width, block.stop // self._width
        rows = delta.view(last - first, self._width)
        left, right = (factors.A.T, factors.B.T) if factors.transposed else (factors.B, factors.A)
        # beta 0 ignores what the memory held, NaN included
        rows.addmm_(left[first:last], right, beta=1.0 if add else 0.0, alpha=factors.scale)


class Deltas:
    """Opens the task vectors of one tensor after the other, keeping the last one's in memory where they fit."""

    def __init__(self, plan_sources: Sequence[str], reader: Reader, budget: int = DELTA_BUDGET) -> None:
        """``plan_sources``: the references, for messages.

        ``budget``: bytes of Δ kept between passes; where it is more, or cheap to form, it is formed anew in each.
        """
        self._references, self._reader, self._budget = plan_sources, reader, budget
        self._buffer = torch.empty(0, dtype=torch.float32)
        self._last: TensorDeltas | None = None

    def open(self, tensor: TensorPlan, prescale: Sequence[float]) -> TensorDeltas:
        """The tensor's task vectors; the last opened tensor again is the same value. Factors are read here, whole.

        Raises ``source_not_finite`` where a factor holds NaN or infinity.
        """
        if self._last is not None and self._last.tensor is not tensor:
            self._last.forget()  # the caller may hold it until it has the next
            self._last = None
        if self._last is None:
            factors = [self._factors(contribution) for contribution in tensor.contributions]
            self._last = TensorDeltas(tensor, factors, prescale, self._reader, self._room(tensor))
        return self._last

    def _room(self, tensor: TensorPlan) -> torch.Tensor | None:
        if not any(map(_worth_keeping, tensor.contributions)):
            return None
        values = kept_values(cut(tensor.shape), len(tensor.contributions))
        if values * 4 > self._budget:
            return None
        if len(self._buffer) < values:
            self._buffer = torch.empty(0, dtype=torch.float32)  # never two of them: the budget is for one
            self._buffer = torch.empty(values, dtype=torch.float32)
        return self._buffer

    def _factors(self, contribution: Contribution) -> Factors | None:
        lora = contribution.lora
        if lora is None:
            return None
        A, B = self._reader.whole(lora.A), self._reader.whole(lora.B)
        for spec, values in ((lora.A, A), (lora.B, B)):
            if not all_finite(values):
                raise not_finite(self._references[contribution.source], spec.name)
        return Factors(A, B, lora.scale, lora.transposed)


def _worth_keeping(contribution: Contribution) -> bool:
    lora = contribution.lora
    return contribution.full is not None or (lora is not None and lora.A.shape[0] > _CHEAP_RANK)


def kept_values(blocks: Sequence[Block], sources: int) -> int:
    """float32 values that the Δ of ``blocks`` take together, each block from a 64-byte boundary on."""
    return sum(-(-sources * block.size // _ALIGNED) * _ALIGNED for block in blocks)


def all_finite(values: torch.Tensor) -> bool:
    """No NaN and no infinity. The extremes carry both, in one pass and without a temporary."""
    if values.numel() == 0 or not values.dtype.is_floating_point:
        return True
    low, high = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def not_finite(reference: str, tensor: str) -> MergeyardError:
    return MergeyardError(
        "source_not_finite",
        f"{reference} holds NaN, infinity or a value beyond float32 in tensor {tensor}; repair or leave it out.",
    )
