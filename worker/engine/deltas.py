"""Task vectors, block by block: what each source changes in the values of one block, in float32.

Every pass over a tensor sees the same bits: blocks are cut by shape alone, each product of a block is one
single-threaded BLAS call, and operands and results start at 64-byte boundaries or at the same offset from one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, LifoQueue

import torch

from app.errors import MergeyardError
from app.planning.plan import Contribution, TensorPlan
from app.sources.source import StoredTensor, TensorSpec
from worker.engine.blocks import Block, cut, row_width
from worker.engine.factors import FactorReader, Factors, norms_span_blocks
from worker.engine.reader import Reader

DELTA_BUDGET = 512_000_000  # bytes of Δ kept between passes; the planner's estimate counts on it
_ALIGNED = 16  # float32 values in 64 bytes
SAMPLE_GROUPS = 32
_SAMPLE_VALUES = 2048  # of a group of whole rows
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
class OpenFactors:
    """What an adapter adds to a tensor: ΔW of factors, and values as they are (float32, flat)."""

    lora: Factors | None
    added: torch.Tensor | None


class TensorDeltas:
    """The task vectors of one tensor. Blocks may be asked for from several threads, each block by one at a time."""

    def __init__(
        self,
        tensor: TensorPlan,
        factors: Sequence[OpenFactors],
        prescale: Sequence[float],
        reader: Reader,
        kept: torch.Tensor | None,
    ) -> None:
        """``prescale`` multiplies each δ; ``kept`` (float32, flat) holds what was formed, None keeps nothing."""
        self.tensor = tensor
        self.blocks = cut(tensor.shape)
        self._factors, self._prescale, self._reader = factors, prescale, reader
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

    def sample(self, index: int, columns: int, scratch: Scratch) -> torch.Tensor:
        """Some values of one contribution's δ, float32 (groups, m), each group spread over the tensor.

        Their last bits need not be those that a block has. Of a plain product each group is a grid of rows and
        ``columns`` columns of its own, else a few whole rows.
        """
        contribution = self.tensor.contributions[index]
        factors, added = self._factors[index].lora, self._factors[index].added
        if factors is not None and added is None and contribution.full is None and factors.spans(self.tensor.shape):
            return factors.sample(SAMPLE_GROUPS, columns) * self._prescale[index]
        width = row_width(self.tensor.shape)
        rows = math.prod(self.tensor.shape) // width
        own = min(-(-_SAMPLE_VALUES // width), -(-rows // SAMPLE_GROUPS))
        values = torch.empty(SAMPLE_GROUPS, own * width)
        for group in range(SAMPLE_GROUPS):
            start = group * (rows - own) // (SAMPLE_GROUPS - 1) * width
            self._form(index, contribution, Block(0, start, start + own * width), values[group], scratch)
        return values

    def _form(
        self, index: int, contribution: Contribution, block: Block, delta: torch.Tensor, scratch: Scratch
    ) -> None:
        factors, added = self._factors[index].lora, self._factors[index].added
        if factors is not None and factors.magnitude is not None:
            self._rescaled(factors, contribution.full or self.tensor.base, block, delta, scratch)
        elif contribution.full is not None:
            self._read(contribution.full, block, delta, scratch)
            self._subtract_base(block, delta, scratch)
            if factors is not None:
                factors.add_product(block.start, block.stop, delta, keep=True)
        elif factors is not None:
            factors.add_product(block.start, block.stop, delta, keep=False)
        else:
            delta.zero_()
        if added is not None:
            delta.add_(added[block.start : block.stop])
        if self._prescale[index] != 1.0:
            delta.mul_(self._prescale[index])

    def _rescaled(
        self, factors: Factors, weights: StoredTensor, block: Block, delta: torch.Tensor, scratch: Scratch
    ) -> None:
        """DoRA: what the weights become, minus the base."""
        self._read(weights, block, delta, scratch)
        factors.add_product(block.start, block.stop, delta, keep=True)
        factors.rescale(block.start, block.stop, delta, self.tensor.name)
        self._subtract_base(block, delta, scratch)

    def _subtract_base(self, block: Block, delta: torch.Tensor, scratch: Scratch) -> None:
        base = scratch.floats("base", block.size)
        self._read(self.tensor.base, block, base, scratch)
        delta.sub_(base)

    def _read(self, stored: StoredTensor, block: Block, values: torch.Tensor, scratch: Scratch) -> None:
        self._reader.float32(stored, block.start, block.stop, values, scratch.bytes("raw", block.size * 8))


class Deltas:
    """Opens the task vectors of one tensor after the other, keeping the last one's in memory where they fit."""

    def __init__(self, plan_sources: Sequence[str], reader: Reader, budget: int = DELTA_BUDGET) -> None:
        """``plan_sources``: the references, for messages.

        ``budget``: bytes of Δ kept between passes; where it is more, or cheap to form, it is formed anew in each.
        """
        self._references, self._reader, self._budget = plan_sources, reader, budget
        self._factors = FactorReader(reader)
        self._norms: dict[tuple[str, int], torch.Tensor] = {}  # of every pass over the model; a value for each output
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
            factors = [self._open(tensor, contribution) for contribution in tensor.contributions]
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

    def _open(self, tensor: TensorPlan, contribution: Contribution) -> OpenFactors:
        def refuse(spec: TensorSpec) -> MergeyardError:
            return not_finite(self._references[contribution.source], spec.name)

        added = None if contribution.added is None else self._factors.added(contribution.added, refuse)
        if contribution.lora is None:
            return OpenFactors(None, added)
        factors = self._factors.open(contribution.lora, tensor.shape, refuse)
        if norms_span_blocks(contribution.lora, tensor.shape):
            key = (tensor.name, contribution.source)
            if key not in self._norms:
                self._norms[key] = self._norms_of(tensor, contribution, factors)
            factors = replace(factors, norms=self._norms[key])
        return OpenFactors(factors, added)

    def _norms_of(self, tensor: TensorPlan, contribution: Contribution, factors: Factors) -> torch.Tensor:
        """DoRA's norms of W + ΔW, float64, summed up block after block."""
        scratch, weights = Scratch(), contribution.full or tensor.base
        squares = torch.zeros(1, dtype=torch.float64)
        for block in cut(tensor.shape):
            values = scratch.floats("deltas", block.size)
            self._reader.float32(weights, block.start, block.stop, values, scratch.bytes("raw", block.size * 8))
            factors.add_product(block.start, block.stop, values, keep=True)
            squares = squares + factors.squares(block.start, block.stop, values)
        return squares.sqrt_()


def _worth_keeping(contribution: Contribution) -> bool:
    lora = contribution.lora
    if contribution.full is not None or lora is None:
        return contribution.full is not None
    return lora.magnitude is not None or lora.rank > _CHEAP_RANK


def kept_values(blocks: Sequence[Block], sources: int) -> int:
    """float32 values that the Δ of ``blocks`` take together, each block from a 64-byte boundary on."""
    return sum(-(-sources * block.size // _ALIGNED) * _ALIGNED for block in blocks)


def not_finite(reference: str, tensor: str) -> MergeyardError:
    return MergeyardError(
        "source_not_finite",
        f"{reference} holds NaN, infinity or a value beyond float32 in tensor {tensor}; repair or leave it out.",
    )
