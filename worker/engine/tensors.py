"""One output tensor, block by block: copied, or merged."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from app.artifacts.manifest import TensorStatistics
from app.errors import MergeyardError
from app.planning.plan import Plan, TensorPlan
from worker.engine.blocks import Block
from worker.engine.deltas import KERNEL_DTYPES, Scratch, TensorDeltas, not_finite
from worker.engine.factors import all_finite
from worker.engine.kernels.signature import KEEP_ALL, BlockStatistics, Rule
from worker.engine.methods import Blend, Blended, Mask
from worker.engine.reader import Reader, dtype_of
from worker.engine.trimming import TensorTrims, trims_at
from worker.engine.views import BlockView, Resources, TensorPass

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
                raise overflow(tensor)

    return copy


def pass_over(
    plan: Plan, deltas: TensorDeltas, resources: Resources, pulse: Callable[[TensorPlan, Block], None]
) -> TensorPass:
    """Sweeps over one tensor, for methods that reduce. Raises ``not_supported`` where it holds whole numbers."""
    tensor = deltas.tensor
    _check_floating(tensor)
    identities = _identities([source.reference for source in plan.sources])
    return TensorPass(
        deltas=deltas,
        identities=[identities[contribution.source] for contribution in tensor.contributions],
        resources=resources,
        pulse=pulse,
        refusal=lambda block: _refusal(plan, tensor, block, resources.reader),
    )


def merging(
    plan: Plan,
    deltas: TensorDeltas,
    resources: Resources,
    *,
    trims: TensorTrims,
    weights: Sequence[float],
    rule: Rule,
) -> BlockWork:
    """Merges a block by the method's rule. Raises ``source_not_finite``, ``result_not_finite``, ``not_supported``."""
    tensor, reader = deltas.tensor, resources.reader
    _check_floating(tensor)
    dtype = dtype_of(tensor.dtype, tensor.name)

    def merge(block: Block, buffer: torch.Tensor, scratch: Scratch) -> BlockStatistics:
        base = deltas.stored_base(block, scratch)
        values = deltas.operands(block, scratch, base=base)
        with _result(block, buffer, dtype, scratch) as result:
            found = resources.kernels.merge(base, values, trims_at(trims, block), weights, rule, result)
        return _checked(plan, tensor, block, reader, found)

    return merge


def masking(plan: Plan, passing: TensorPass, mask: Mask, *, weights: Sequence[float], rule: Rule) -> BlockWork:
    """Multiplies δ by the method's mask, then merges as ``merging`` does, without a trim."""
    tensor, reader = passing.tensor, passing.resources.reader
    dtype = dtype_of(tensor.dtype, tensor.name)
    everything = [KEEP_ALL] * len(tensor.contributions)

    def merge(block: Block, buffer: torch.Tensor, scratch: Scratch) -> BlockStatistics:
        view = passing.view(block, scratch)
        factors = mask(view)
        values = scratch.floats("masked", factors.numel()).view(factors.shape)
        torch.mul(view.deltas, factors, out=values)
        base = passing.deltas.stored_base(block, scratch)
        with _result(block, buffer, dtype, scratch) as result:
            found = passing.kernels.merge(base, list(values), everything, weights, rule, result)
        kept = tuple(factors.count_nonzero(1).tolist())
        return _checked(plan, tensor, block, reader, replace(found, kept=kept, squares=_squares(view.deltas)))

    return merge


def blending(plan: Plan, passing: TensorPass, blend: Blend) -> BlockWork:
    """Merges a block by a blend method's own arithmetic. Raises as ``merging`` does."""
    tensor = passing.tensor
    dtype = dtype_of(tensor.dtype, tensor.name)

    def merge(block: Block, buffer: torch.Tensor, scratch: Scratch) -> BlockStatistics:
        view = passing.view(block, scratch)
        blended = blend(view)
        out = buffer[: block.size * dtype.itemsize].view(dtype)
        out.copy_(blended.result)
        found = _statistics(view, blended, finite=all_finite(out))
        return _checked(plan, tensor, block, passing.resources.reader, found)

    return merge


def _statistics(view: BlockView, blended: Blended, *, finite: bool) -> BlockStatistics:
    """The kernels' counts, for a block that they did not merge."""
    deltas = view.deltas
    kept = torch.tensor(True) if blended.kept is None else blended.kept
    positive, negative = (((deltas > 0) & kept).any(0), ((deltas < 0) & kept).any(0))
    return BlockStatistics(
        kept=tuple(kept.expand(deltas.shape).count_nonzero(1).tolist()),
        squares=_squares(deltas),
        active=int((positive | negative).sum()),
        conflicts=int((positive & negative).sum()),
        merged_square=float((blended.result - view.base).double().square().sum()),
        finite=finite,
    )


def _squares(deltas: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(delta.double().square().sum()) for delta in deltas)


def _check_floating(tensor: TensorPlan) -> None:
    if not all(dtype_of(name, tensor.name).is_floating_point for name in (tensor.dtype, tensor.base.dtype)):
        raise MergeyardError(
            "not_supported", f"Tensor {tensor.name} holds whole numbers ({tensor.base.dtype}) and cannot be merged."
        )


@contextlib.contextmanager
def _result(block: Block, buffer: torch.Tensor, dtype: torch.dtype, scratch: Scratch) -> Iterator[torch.Tensor]:
    """Where the kernels write: the buffer itself, or float32 that is cast into it afterwards."""
    out = buffer[: block.size * dtype.itemsize].view(dtype)
    result = out if dtype in KERNEL_DTYPES else scratch.floats("result", block.size)
    yield result
    if result is not out:
        out.copy_(result)


def _checked(plan: Plan, tensor: TensorPlan, block: Block, reader: Reader, found: BlockStatistics) -> BlockStatistics:
    # a NaN or infinity in any source shows in one of these, so that good blocks need no pass of their own
    if not (found.finite and all(map(math.isfinite, found.squares))):
        raise _refusal(plan, tensor, block, reader)
    return found


def _identities(references: Sequence[str]) -> list[str]:
    """Each source's reference, and which of its equals it is: the sources stand in an order that no recipe changes."""
    seen: Counter[str] = Counter()
    found = []
    for reference in references:
        found.append(json.dumps([reference, seen[reference]]))
        seen[reference] += 1
    return found


def _refusal(plan: Plan, tensor: TensorPlan, block: Block, reader: Reader) -> MergeyardError:
    """Name what is not finite: the base, a source's own values, or only the result."""
    values = torch.empty(block.size)
    raw = torch.empty(block.size * 8, dtype=torch.uint8)
    reader.float32(tensor.base, block.start, block.stop, values, raw)
    if not all_finite(values):
        return not_finite(plan.owner(tensor.base), tensor.base.name)
    for contribution in tensor.contributions:
        if contribution.full is not None:
            reader.float32(contribution.full, block.start, block.stop, values, raw)
            if not all_finite(values):
                return not_finite(plan.sources[contribution.source].reference, contribution.full.name)
    return overflow(tensor)


def overflow(tensor: TensorPlan) -> MergeyardError:
    """``result_not_finite``, with what to do about it."""
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
