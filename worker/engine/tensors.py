"""One output tensor, block by block: copied, or merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from app.artifacts.manifest import TensorStatistics
from app.errors import MergeyardError
from app.planning.plan import Plan, TensorPlan
from worker.engine.blocks import Block
from worker.engine.deltas import Scratch, TensorDeltas, not_finite
from worker.engine.factors import all_finite
from worker.engine.kernels.signature import BlockStatistics, Kernels, Rule
from worker.engine.reader import Reader, dtype_of
from worker.engine.trimming import TensorTrims, trims_at

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

BlockWork = Callable[[Block, torch.Tensor, Scratch], BlockStatistics | None]  # fills the buffer's first bytes


def copying(plan: Plan, tensor: TensorPlan, reader: Reader) -> BlockWork:
    """Copies a block, cast where the output's dtype is another. Raises ``source_not_finite``, ``result_not_finite``."""
    dtype = dtype_of(tensor.dtype, tensor.name)
    same = tensor.dtype == tensor.base.dtype

    def copy(block: Block, buffer: torch.Tensor, scratch: Scratch) -> None:
        # where nothing is cast, the block is read straight into the buffer it is written from
        place = buffer if same else scratch.bytes("raw", block.size * 8)
        values = reader.native(tensor.base, block.start, block.stop, place)
        if not all_finite(values):
            raise not_finite(plan.owner(tensor.base), tensor.base.name)
        if not same:
            out = buffer[: block.size * dtype.itemsize].view(dtype)
            out.copy_(values)
            if not all_finite(out):
                raise _overflow(tensor)

    return copy


def merging(
    plan: Plan,
    tensor: TensorPlan,
    reader: Reader,
    *,
    kernels: Kernels,
    deltas: TensorDeltas,
    trims: TensorTrims,
    weights: Sequence[float],
    rule: Rule,
) -> BlockWork:
    """Merges a block by the method's rule. Raises ``source_not_finite``, ``result_not_finite``, ``not_supported``."""
    dtype = dtype_of(tensor.dtype, tensor.name)
    stored = dtype_of(tensor.base.dtype, tensor.name)
    if not (dtype.is_floating_point and stored.is_floating_point):
        raise MergeyardError(
            "not_supported", f"Tensor {tensor.name} holds whole numbers ({tensor.base.dtype}) and cannot be merged."
        )

    def merge(block: Block, buffer: torch.Tensor, scratch: Scratch) -> BlockStatistics:
        values = deltas.of(block, scratch)
        if stored in _KERNEL_DTYPES:
            base = reader.native(tensor.base, block.start, block.stop, scratch.bytes("raw", block.size * 8))
        else:
            base = scratch.floats("base", block.size)
            reader.float32(tensor.base, block.start, block.stop, base, scratch.bytes("raw", block.size * 8))
        out = buffer[: block.size * dtype.itemsize].view(dtype)
        result = out if dtype in _KERNEL_DTYPES else scratch.floats("result", block.size)
        found = kernels.merge(base, values, trims_at(trims, block), weights, rule, result)
        if result is not out:
            out.copy_(result)
        # a NaN or infinity in any source shows in one of these, so that good blocks need no pass of their own
        if not (found.finite and all(map(math.isfinite, found.squares))):
            _refuse(plan, tensor, block, reader)
        return found

    return merge


def _refuse(plan: Plan, tensor: TensorPlan, block: Block, reader: Reader) -> NoReturn:
    """Name what is not finite: the base, a source's own values, or only the result."""
    values = torch.empty(block.size)
    raw = torch.empty(block.size * 8, dtype=torch.uint8)
    reader.float32(tensor.base, block.start, block.stop, values, raw)
    if not all_finite(values):
        raise not_finite(plan.owner(tensor.base), tensor.base.name)
    for contribution in tensor.contributions:
        if contribution.full is not None:
            reader.float32(contribution.full, block.start, block.stop, values, raw)
            if not all_finite(values):
                raise not_finite(plan.sources[contribution.source].reference, contribution.full.name)
    raise _overflow(tensor)


def _overflow(tensor: TensorPlan) -> MergeyardError:
    return MergeyardError(
        "result_not_finite",
        f"The merged values of {tensor.name} do not fit {tensor.dtype}; lower the weights or lambda, or choose a wider "
        "out_dtype.",
    )


@dataclass(slots=True)
class StatisticsSum:
    """Adds up a tensor's blocks, in block order, so that the sums never depend on threads."""

    tensor: TensorPlan
    kept: list[int] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    active: int = 0
    conflicts: int = 0
    merged_square: float = 0.0

    def __post_init__(self) -> None:
        self.kept = [0] * len(self.tensor.contributions)
        self.squares = [0.0] * len(self.tensor.contributions)

    def add(self, block: BlockStatistics) -> None:
        for index, (kept, square) in enumerate(zip(block.kept, block.squares, strict=True)):
            self.kept[index] += kept
            self.squares[index] += square
        self.active += block.active
        self.conflicts += block.conflicts
        self.merged_square += block.merged_square

    def result(self) -> TensorStatistics:
        values = math.prod(self.tensor.shape)
        return TensorStatistics(
            sources=tuple(contribution.source for contribution in self.tensor.contributions),
            trimmed=tuple(1 - kept / values if values else 0.0 for kept in self.kept),
            sign_conflict=self.conflicts / self.active if self.active else 0.0,
            source_norms=tuple(map(math.sqrt, self.squares)),
            merged_norm=math.sqrt(self.merged_square),
            parameters=values,
        )
