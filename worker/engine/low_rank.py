"""Low-rank matrices as pairs of factors, and their small factorisations: float64, nothing of the matrix's own size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROUNDING = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrix left·right of rank r at most: ``left`` (out, r), ``right`` (r, in), float64."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def square(self) -> float:
        """‖left·right‖² (Frobenius)."""
        return max(0.0, float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum()))

    @property
    def vanishes(self) -> bool:
        """Whether its columns cancel each other, so that nothing but their rounding is left."""
        return self.square <= 4 * _ROUNDING * float(self.left.square().sum() * self.right.square().sum())

    def times(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)


def difference(one: LowRank, other: LowRank) -> LowRank:
    """one - other, of factors that are close: exact where they are equal."""
    left = torch.cat([one.left - other.left, other.left], 1)
    return LowRank(left, torch.cat([one.right, one.right - other.right], 0))


@dataclass(frozen=True, slots=True)
class Singular:
    """U (out, k), S (k,) falling, V (in, k) of a matrix U·diag(S)·Vᵀ; k is its numerical rank."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor


def singular(matrix: LowRank) -> Singular:
    """The singular value decomposition by QR of both factors: O((out + in)·r²)."""
    left, right = torch.linalg.qr(matrix.left), torch.linalg.qr(matrix.right.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    rank = _rank(S, max(len(matrix.left), matrix.right.shape[1]))
    U, V = left.Q @ U[:, :rank], right.Q @ Vh[:rank].T
    signs = _signs(U)
    return Singular(U * signs, S[:rank], V * signs)


def basis_of(stack: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of ``stack`` (n, R): (n, p), orthonormal, p its numerical rank.

    The sign of each is that of its entry of largest magnitude (the first, among equals): merging by signs depends on
    the basis, so it must be one and the same for the same sources.
    """
    U: torch.Tensor
    U, S, _ = torch.linalg.svd(stack, full_matrices=False)
    U = U[:, : _rank(S, max(stack.shape))]
    return U * _signs(U)


def polar_factor(stack: torch.Tensor) -> torch.Tensor:
    """The orthonormal matrix nearest to ``stack`` (n, R): P·Qᵀ of its P·Σ·Qᵀ, over the directions it really has."""
    P: torch.Tensor
    P, S, Qh = torch.linalg.svd(stack, full_matrices=False)
    rank = _rank(S, max(stack.shape))
    nearest: torch.Tensor = P[:, :rank] @ Qh[:rank]
    return nearest


def _rank(values: torch.Tensor, size: int) -> int:
    """How many singular values stand above the rounding of the largest."""
    return int((values > values[0] * size * _ROUNDING).sum()) if len(values) else 0


def _signs(vectors: torch.Tensor) -> torch.Tensor:
    """+1 or -1 for each column: the sign of its largest entry."""
    if not vectors.numel():
        return vectors.new_ones(vectors.shape[1])
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).double()
