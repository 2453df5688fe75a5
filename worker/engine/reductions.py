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
        """Along the last axis: whole within a block. A tensor of one axis is one vector."""
        return cls("rows", shape[-1]) if len(shape) > 1 else cls.whole(shape)

    @classmethod
    def columns(cls, shape: tuple[int, ...]) -> Grouping:
        """Along the first axis. A tensor of one axis is one vector."""
        return cls("columns", math.prod(shape[1:])) if len(shape) > 1 else cls.whole(shape)


def gram(tensor: TensorPass, vectors: Values, grouping: Grouping) -> torch.Tensor:
    """⟨v_k, v_l⟩ of every group that spans blocks, float64 (groups, K, K).

    ``vectors`` gives the v of a block, float32 (K, n).
    """

    def of_block(view: BlockView) -> list[tuple[slice, torch.Tensor]]:
        values = vectors(view)
        return [(piece.group, _products(values, piece, grouping)) for piece in _pieces(view.block, grouping)]

    result: torch.Tensor | None = None
    for parts in tensor.each(of_block):
        for group, products in parts:
            if result is None:
                groups = grouping.width if grouping.along == "columns" else 1
                result = torch.zeros((groups, *products.shape[1:]), dtype=torch.float64)
            result[group] += products
    assert result is not None  # an empty tensor is not merged
    return result


def gram_of_rows(block: Block, vectors: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """⟨v_k, v_l⟩ of the rows of one block, float64 (rows, K, K), where the grouping is by rows."""
    (piece,) = _pieces(block, grouping)
    return _products(vectors, piece, grouping)


def combined(block: Block, vectors: torch.Tensor, coefficients: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """Σ_k c_k·v_k, float32 (n,), in the order of the vectors.

    ``coefficients``: (groups, K), where the grouping is by rows those of the block.
    """
    result = torch.zeros(vectors.shape[1])
    for piece in _pieces(block, grouping):
        own = coefficients[piece.group].float()
        part = result[piece.start : piece.stop].view(piece.rows, -1)
        for index, values in enumerate(vectors):
            factor = own[:, index] if grouping.along == "columns" else own[:, index, None]
            part += factor * values[piece.start : piece.stop].view(piece.rows, -1)
    return result


@dataclass(frozen=True, slots=True)
class _Piece:
    """A rectangle of rows: values ``start`` to ``stop`` of a block, and the groups that they are in."""

    start: int
    stop: int
    rows: int
    group: slice


def _pieces(block: Block, grouping: Grouping) -> Iterator[_Piece]:
    if grouping.along == "tensor":
        yield _Piece(0, block.size, 1, slice(0, 1))
    elif grouping.along == "rows":
        rows = block.size // grouping.width
        yield _Piece(0, block.size, rows, slice(0, rows))
    else:
        yield from _columns(block, grouping.width)


def _columns(block: Block, width: int) -> Iterator[_Piece]:
    """A block may begin and end within a row of columns: the end of one, whole ones, the beginning of another."""
    start = block.start
    while start < block.stop:
        column = start % width
        rows = max(1, (block.stop - start) // width) if column == 0 else 1
        stop = min(block.stop, start - column + rows * width)
        columns = (stop - start) // rows
        yield _Piece(start - block.start, stop - block.start, rows, slice(column, column + columns))
        start = stop


def _products(values: torch.Tensor, piece: _Piece, grouping: Grouping) -> torch.Tensor:
    """float64 (groups of the piece, K, K)."""
    count = len(values)
    part = values[:, piece.start : piece.stop].double().view(count, piece.rows, -1)
    axis = 0 if grouping.along == "columns" else 1
    products = torch.empty((part.shape[2 - axis], count, count), dtype=torch.float64)
    for k in range(count):
        for other in range(k, count):
            products[:, k, other] = products[:, other, k] = (part[k] * part[other]).sum(axis)
    return products
