"""Sums that a method may take over a tensor before it merges it: plain ones, and Gram matrices of its vectors.

Within a block floats are summed in float64, and blocks are added up in order, so that no result depends on threads or
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from worker.engine.blocks import Block
from worker.engine.views import BlockView, TensorPass

Values = Callable[[BlockView], torch.Tensor]


def total(tensor: TensorPass, of_block: Values) -> torch.Tensor:
    """Σ of ``of_block`` (any shape, the same for all blocks) in float64; 0 where the tensor is empty."""
    result = torch.zeros((), dtype=torch.float64)
    for part in tensor.each(of_block):
        result = result + part.double()
    return result


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a tensor's flat values fall into vectors: all are one, or each row of ``width`` values, or each column."""

    along: Literal["tensor", "rows", "columns"]
    width: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Grouping:
        return cls("tensor", math.prod(shape))

    @classmethod
    def rows(cls, shape: tuple[int, ...]) -> Grouping:
        """The last axis; a tensor of one axis is one vector."""
        return cls("rows", shape[-1]) if len(shape) > 1 else cls.whole(shape)

    @classmethod
    def columns(cls, shape: tuple[int, ...]) -> Grouping:
        """The first axis; a tensor of one axis is one vector."""
        return cls("columns", math.prod(shape[1:])) if len(shape) > 1 else cls.whole(shape)

    def groups(self, numel: int) -> int:
        """The number of vectors in a tensor of ``numel`` values."""
        if self.along == "tensor":
            return 1
        return self.width if self.along == "columns" else numel // self.width


def gram(tensor: TensorPass, vectors: Values, grouping: Grouping) -> torch.Tensor:
    """⟨v_k, v_l⟩ of every group, float64 (groups, K, K); ``vectors`` gives the v of a block, float32 (K, n)."""

    def of_block(view: BlockView) -> list[tuple[slice, torch.Tensor]]:
        values = vectors(view)
        return [(piece.group, _products(values, piece, grouping)) for piece in _pieces(view.block, grouping)]

    result: torch.Tensor | None = None
    for parts in tensor.each(of_block):
        for groups, products in parts:
            if result is None:
                count = products.shape[-1]
                numel = math.prod(tensor.tensor.shape)
                result = torch.zeros((grouping.groups(numel), count, count), dtype=torch.float64)
            result[groups] += products
    return torch.zeros((0, 0, 0), dtype=torch.float64) if result is None else result


def combined(block: Block, vectors: torch.Tensor, coefficients: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """Σ_k c_k·v_k, float32 (n,), in the order of the vectors; ``coefficients``: (groups, K)."""
    result = torch.zeros(vectors.shape[1])
    for piece in _pieces(block, grouping):
        own = coefficients[piece.group].float()  # (groups of the piece, K)
        part = result[piece.start : piece.stop].view(piece.rows, -1)
        for index, values in enumerate(vectors):
            factor = own[:, index]
            factor = factor[:, None] if grouping.along == "rows" else factor
            part += factor * values[piece.start : piece.stop].view(piece.rows, -1)
    return result


@dataclass(frozen=True, slots=True)
class _Piece:
    """A rectangle of whole or partial rows: values ``start`` to ``stop`` of a block, and the groups they are in."""

    start: int
    stop: int
    rows: int
    group: slice


def _pieces(block: Block, grouping: Grouping) -> Iterator[_Piece]:
    """Cut a block at the rows: the end of one, whole ones, the beginning of another."""
    if grouping.along == "tensor":
        yield _Piece(0, block.size, 1, slice(0, 1))
        return
    width, start = grouping.width, block.start
    while start < block.stop:
        row, column = divmod(start, width)
        whole = (block.stop - start) // width if column == 0 else 0
        stop = start + whole * width if whole else min(block.stop, (row + 1) * width)
        rows = max(1, whole)
        columns = (stop - start) // rows
        group = slice(row, row + rows) if grouping.along == "rows" else slice(column, column + columns)
        yield _Piece(start - block.start, stop - block.start, rows, group)
        start = stop


def _products(values: torch.Tensor, piece: _Piece, grouping: Grouping) -> torch.Tensor:
    """float64 (groups of the piece, K, K)."""
    part = values[:, piece.start : piece.stop].double().view(len(values), piece.rows, -1)
    axis = 1 if grouping.along == "columns" else 2
    count = len(values)
    products = torch.empty((part.shape[3 - axis], count, count), dtype=torch.float64)
    for k in range(count):
        for other in range(k, count):
            products[:, k, other] = products[:, other, k] = (part[k] * part[other]).sum(axis - 1)
    return products
