"""What a method that reduces sees of a tensor: one block at a time, and sweeps over all of them.

Values are formed from the files when a method asks for them and never held beyond the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from app.errors import MergeyardError
from app.planning.plan import Contribution, TensorPlan
from worker.engine.blocks import Block, Crew, row_width
from worker.engine.deltas import Deltas, Scratch, ScratchPool, TensorDeltas
from worker.engine.factors import all_finite
from worker.engine.kernels.signature import Kernels
from worker.engine.reader import Reader

Result = TypeVar("Result")


class BlockView:
    """One block of one tensor. What it gives is valid until the work on the block ends, and is not to be changed."""

    def __init__(self, block: Block, deltas: TensorDeltas, reader: Reader, scratch: Scratch) -> None:
        self.block, self.tensor = block, deltas.tensor
        self._deltas, self._reader, self._scratch = deltas, reader, scratch
        self._base: torch.Tensor | None = None
        self._formed: torch.Tensor | None = None
        self._sources: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        """float32 (n,)."""
        if self._base is None:
            self._base = self._scratch.floats("origin", self.block.size)
            self._reader.float32(self.tensor.base, self.block.start, self.block.stop, self._base, self._raw)
        return self._base

    @property
    def deltas(self) -> torch.Tensor:
        """δ of every contribution, float32 (N, n)."""
        if self._formed is None:
            self._formed = self._deltas.of(self.block, self._scratch)
        return self._formed

    @property
    def sources(self) -> torch.Tensor:
        """Every contribution's own values x, float32 (N, n): a full model's as its file has them, else base + δ."""
        if self._sources is None:
            count = len(self.tensor.contributions)
            values = self._scratch.floats("sources", count * self.block.size).view(count, self.block.size)
            for index, contribution in enumerate(self.tensor.contributions):
                if contribution.full is not None and contribution.lora is None and contribution.added is None:
                    stored = contribution.full
                    self._reader.float32(stored, self.block.start, self.block.stop, values[index], self._raw)
                elif contribution.changes:
                    torch.add(self.base, self.deltas[index], out=values[index])
                else:
                    values[index].copy_(self.base)
            self._sources = values
        return self._sources

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """The block's values (n,) as its rows (rows, m); a tensor of one axis is one row, as far as the block goes.

        A row is the product of the trailing axes, fewer of them where that is more than a block (``row_width``).
        """
        shape = self.tensor.shape
        return values.view(-1, row_width(shape) if len(shape) > 1 else max(1, self.block.size))

    @property
    def _raw(self) -> torch.Tensor:
        return self._scratch.bytes("raw", self.block.size * 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a merge's passes work with."""

    kernels: Kernels
    crew: Crew
    reader: Reader
    scratches: ScratchPool
    deltas: Deltas


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPass:
    """Sweeps over one tensor, for a method that must reduce before it can merge.

    ``identities``: of each contribution's source, a text that no other source of the merge has and that does not
    depend on the order of the sources. ``refusal``: the error that names what is not finite in a block.
    """

    deltas: TensorDeltas
    identities: Sequence[str]
    resources: Resources
    pulse: Callable[[TensorPlan, Block], None]
    refusal: Callable[[Block], MergeyardError]
    _checked: set[int] = field(default_factory=set)

    @property
    def tensor(self) -> TensorPlan:
        return self.deltas.tensor

    @property
    def contributions(self) -> Sequence[Contribution]:
        return self.tensor.contributions

    @property
    def kernels(self) -> Kernels:
        return self.resources.kernels

    def each(self, work: Callable[[BlockView], Result]) -> Iterator[Result]:
        """``work`` on every block, side by side; results in the order of the blocks.

        Raises ``source_not_finite`` at the first block that holds NaN or infinity, so that none reaches a reduction.
        """

        def of_block(block: Block) -> tuple[Block, Result]:
            with self.resources.scratches.borrow() as scratch:
                view = self.view(block, scratch)
                if block.index not in self._checked:
                    if not (all_finite(view.deltas) and all_finite(view.base)):
                        raise self.refusal(block)
                    self._checked.add(block.index)
                return block, work(view)

        for block, result in self.resources.crew.in_order(of_block, self.deltas.blocks):
            self.pulse(self.tensor, block)
            yield result

    def view(self, block: Block, scratch: Scratch) -> BlockView:
        return BlockView(block, self.deltas, self.resources.reader, scratch)
