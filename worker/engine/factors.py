"""ΔW of an adapter over a range of a tensor's values, from its factors: low rank, or DoRA's rescaled weights.

A tensor is a matrix of its first axis by all others, or as many matrices as it has experts, one after the other.
LoRA: Hu et al. 2021, arXiv 2106.09685. AdaLoRA: Zhang et al. 2023, arXiv 2303.10512. DoRA: Liu et al. 2024,
arXiv 2402.09353. Everything is float32, DoRA's norms are summed in float64.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from app.errors import MergeyardError
from app.planning.budgets import EXPERT_FACTOR_BYTES
from app.planning.plan import LoraFactors, ScaledTensor
from app.sources.source import TensorSpec
from worker.engine.blocks import row_width
from worker.engine.reader import Reader

_SAMPLE_ROWS = 32  # of a group
RANK_EPSILON = 1e-5  # PEFT divides AdaLoRA's product by its rank count and this


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of one matrix, and where its values lie in the range asked for."""

    matrix: int
    rows: slice
    columns: slice
    place: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """ΔW = scale · left · right of every matrix of a tensor; with ``magnitude``, DoRA's.

    ``left`` (matrices, rows, r) and ``right`` (matrices, r, columns). ``magnitude`` has a value for each row, or for
    each column where ``by_column``. ``norms`` are those of W + scale·left·right in the same order, where a
    block does not hold all that one of them spans.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    by_column: bool = False
    norms: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    def placed(self, place: Callable[[torch.Tensor], torch.Tensor]) -> Factors:
        """The same with both factors where ``place`` puts them, the last axis of each contiguous."""
        return replace(self, left=place(self.left.contiguous()), right=place(self.right.contiguous()))

    def rectangle(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Left (rows, r) and right (r, columns) whose product is all of the flat values ``start`` to ``stop``.

        None where they are of several matrices, or of none.
        """
        found = list(islice(self.rectangles(start, stop), 2))
        if len(found) != 1 or found[0][2].stop != stop - start:
            return None
        return found[0][:2]

    def rectangles(self, start: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        """Left and right of each part of the range, and where its values lie in it."""
        for piece in self._pieces(start, stop):
            left, right = self.left[piece.matrix, piece.rows], self.right[piece.matrix, :, piece.columns]
            yield left, right, piece.place

    def add_product(self, start: int, stop: int, values: torch.Tensor, *, keep: bool) -> None:
        """Add ΔW's low-rank product over the flat values ``start`` to ``stop`` to ``values`` (or overwrite them)."""
        if not keep:
            values[max(0, self._size - start) :].zero_()  # rows of a vocabulary that grew after the adapter was trained
        for left, right, place in self.rectangles(start, stop):
            part = values[place].view(left.shape[0], right.shape[1])
            # beta 0 ignores what the memory held, NaN included
            part.addmm_(left, right, beta=1.0 if keep else 0.0, alpha=self.scale)

    def spans(self, shape: Sequence[int]) -> bool:
        """Whether ΔW is one plain product, as large as the tensor."""
        return self.magnitude is None and self.left.shape[0] == 1 and self._size == math.prod(shape)

    def sample(self, groups: int, columns: int) -> torch.Tensor:
        """Values of the product, float32 (groups, m): of each group's rows and columns, all evenly spaced."""
        left, right = self.left[0], self.right[0].T
        rows = torch.arange(groups * min(_SAMPLE_ROWS, -(-len(left) // groups)))
        rows = (rows * len(left) // len(rows)).view(-1, groups).T
        across = torch.arange(groups * min(columns, -(-len(right) // groups)))
        across = (across * len(right) // len(across)).view(-1, groups).T
        return torch.bmm(left[rows], right[across].transpose(1, 2)).flatten(1) * self.scale

    def rescale(self, start: int, stop: int, values: torch.Tensor, tensor: str) -> None:
        """DoRA: ``values`` hold W + ΔW and become m ⊙ that over its norms. Raises `adapter_invalid` at a norm of 0."""
        assert self.magnitude is not None
        for piece in self._pieces(start, stop):
            rows, columns = piece.rows, piece.columns
            part = values[piece.place].view(rows.stop - rows.start, columns.stop - columns.start)
            across = columns if self.by_column else rows
            norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) if self.norms is None else None
            if norms is None:
                assert self.norms is not None
                norms = self.norms[across]
            if not bool(norms.all()):
                message = (
                    f"{tensor} has outputs whose weights are all zero, and DoRA divides by their norm; retrain the "
                    "adapter without DoRA, or on a base without such outputs."
                )
                raise MergeyardError("adapter_invalid", message)
            factors = (self.magnitude[across] / norms).float()
            part.mul_(factors if self.by_column else factors[:, None])

    def squares(self, start: int, stop: int, values: torch.Tensor) -> torch.Tensor:
        """Σ values² of the range, float64, for every norm the tensor has."""
        assert self.magnitude is not None
        total = torch.zeros(len(self.magnitude), dtype=torch.float64)
        for piece in self._pieces(start, stop):
            rows, columns = piece.rows, piece.columns
            part = values[piece.place].view(rows.stop - rows.start, columns.stop - columns.start).double()
            total[columns if self.by_column else rows] += part.square_().sum(dim=0 if self.by_column else 1)
        return total

    @property
    def _size(self) -> int:
        return self.left.shape[0] * self.left.shape[1] * self.right.shape[2]

    def _pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The range as rectangles, whole rows together: blocks may end inside a row, or span several matrices."""
        height, width = self.left.shape[1], self.right.shape[2]
        at, stop = start, min(stop, self._size)
        while at < stop:
            matrix, inside = divmod(at, height * width)
            row, column = divmod(inside, width)
            if column or stop - at < width:
                rows, last = 1, min(width, column + stop - at)
            else:
                rows, last = min((stop - at) // width, height - row), width
            size = rows * (last - column)
            yield Piece(matrix, slice(row, row + rows), slice(column, last), slice(at - start, at - start + size))
            at += size


class FactorReader:
    """Reads factors whole, and keeps those of experts that several tensors of a checkpoint share."""

    def __init__(self, reader: Reader, budget: int = EXPERT_FACTOR_BYTES) -> None:
        self._reader, self._budget = reader, budget
        self._shared: OrderedDict[tuple[TensorSpec, TensorSpec], tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def open(self, lora: LoraFactors, shape: Sequence[int], refuse: Callable[[TensorSpec], MergeyardError]) -> Factors:
        """The factors of a tensor of this shape, without DoRA's norms. Raises ``refuse`` of what is not finite."""
        if lora.experts > 1 or lora.expert is not None:
            left, right = self._experts(lora, refuse)
            if lora.expert is not None:
                rows = slice(lora.first_row, lora.first_row + shape[0])
                left, right = left[lora.expert, rows][None], right[lora.expert][None]
            return Factors(left=left, right=right, scale=lora.scale)
        A, B = self._finite(lora.A, refuse).flatten(1), self._finite(lora.B, refuse).flatten(1)
        if lora.singular_values is not None:
            A = A * self._finite(lora.singular_values, refuse).reshape(-1, 1)
        scale = lora.scale
        if lora.rank_count is not None:
            scale /= float(self._finite(lora.rank_count, refuse).reshape(())) + RANK_EPSILON
        left, right = (A.T, B.T) if lora.transposed else (B, A)
        magnitude = None if lora.magnitude is None else self._finite(lora.magnitude, refuse).flatten()
        return Factors(left=left[None], right=right[None], scale=scale, magnitude=magnitude, by_column=lora.transposed)

    def added(self, tensor: ScaledTensor, refuse: Callable[[TensorSpec], MergeyardError]) -> torch.Tensor:
        """float32, flat: what is added as it is."""
        return self._finite(tensor.tensor, refuse).flatten() * tensor.scale

    def _finite(self, spec: TensorSpec, refuse: Callable[[TensorSpec], MergeyardError]) -> torch.Tensor:
        values = self._reader.whole(spec)
        if not all_finite(values):
            raise refuse(spec)
        return values

    def _experts(
        self, lora: LoraFactors, refuse: Callable[[TensorSpec], MergeyardError]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left (experts, rows, r) and right (experts, r, columns), contiguous."""
        key = (lora.A, lora.B)
        found = self._shared.pop(key, None)
        if found is None:
            A, B = self._finite(lora.A, refuse), self._finite(lora.B, refuse)
            A = A.view(lora.experts, -1, A.shape[1])  # (experts, r, in)
            B = B.view(B.shape[0], -1, lora.experts).permute(2, 0, 1)  # (experts, out, r)
            left, right = (A.transpose(1, 2), B.transpose(1, 2)) if lora.transposed else (B, A)
            found = left.contiguous(), right.contiguous()
        if lora.expert is not None:
            self._shared[key] = found
            while len(self._shared) > 1 and sum(_nbytes(pair) for pair in self._shared.values()) > self._budget:
                self._shared.popitem(last=False)
        return found


def norms_span_blocks(lora: LoraFactors, shape: tuple[int, ...]) -> bool:
    """Whether a block may hold only some of the values of one of DoRA's norms."""
    return lora.magnitude is not None and (lora.transposed or row_width(shape) < math.prod(shape[1:]))


def all_finite(values: torch.Tensor) -> bool:
    """No NaN and no infinity. The extremes carry both, in one pass and without a temporary."""
    if values.numel() == 0 or not values.dtype.is_floating_point:
        return True
    low, high = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _nbytes(pair: tuple[torch.Tensor, torch.Tensor]) -> int:
    return sum(values.nbytes for values in pair)
