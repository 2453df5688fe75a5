"""What a merge method is: pure functions of one tensor's plan and of its blocks. A method never sees a file.

Three shapes. A *vote method* gives the kernels a trim, weights and a rule, and may first multiply each δ by a mask. A
*blend method* reduces what it needs over the tensor and returns how a block is merged. A *factor method* makes new
factors of the adapters' own. The engine owns every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

from app.planning.plan import Contribution, TensorPlan
from worker.engine.kernels.signature import Rule
from worker.engine.low_rank import LowRank
from worker.engine.views import BlockView, TensorPass


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the engine must reduce before a tensor can be merged by votes.

    ``trim``: find the exact k-th magnitude of every source over one ``tensor`` or over the whole ``model``
    (a source whose k is all of its values, or none, needs no search).
    ``rescale``: scale what survives to the L1 norm before the trim, over the same scope.
    ``majority``: the sign of the sum of all elected signs of the model, passed to ``rule`` as ``zero_sign``.
    ``prescale``: the weight multiplies δ when it is formed, before anything else; ``weights`` then says 1.
    """

    trim: Literal["none", "tensor", "model"] = "none"
    rescale: bool = False
    majority: bool = False
    prescale: bool = False


class RuleOf(Protocol):
    """Makes the kernels' rule for one tensor.

    ``zero_sign`` is what a zero sum elects; ``sources`` the number of sources of the whole recipe, those that
    do not touch the tensor included.
    """

    def __call__(self, tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule: ...


Mask: TypeAlias = Callable[[BlockView], torch.Tensor]  # a block's factors of δ, float32 (N, n); 0 where it is dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteMethod:
    """A method that merges by votes.

    ``weights``: one factor for each contribution of the tensor, in order.
    ``keep_count``: k, how many of a contribution's ``numel`` values the trim keeps, 0 to ``numel``; over the
    whole model ``numel`` is the size of the source's whole task vector.
    ``mask``: reduces what it needs over the tensor and returns what multiplies δ, block by block; instead of a trim.
    """

    name: str
    needs: Callable[[TensorPlan], Needs]
    weights: Callable[[TensorPlan], list[float]]
    keep_count: Callable[[TensorPlan, Contribution, int], int]
    rule: RuleOf
    mask: Callable[[TensorPass], Mask] | None = None


@dataclass(frozen=True, slots=True)
class Blended:
    """One merged block: ``result`` float32 (n,), and where the method drops values of sources, what it kept.

    ``kept``: bool, (N, n) or (n,) for all sources alike.
    """

    result: torch.Tensor
    kept: torch.Tensor | None = None


Blend: TypeAlias = Callable[[BlockView], Blended]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendMethod:
    """A method that merges by its own arithmetic.

    ``prepare`` reduces over the tensor what the method needs, and returns how one block is merged.
    """

    name: str
    prepare: Callable[[TensorPass], Blend]


@dataclass(frozen=True, slots=True)
class MatrixMerge:
    """Small matrices merged to one: ``values`` float64, of their shape.

    ``trimmed``: the share of each source's values set to zero; ``sign_conflict``: of the values that any source still
    changes, the share where sources disagree in sign.
    """

    values: torch.Tensor
    trimmed: tuple[float, ...]
    sign_conflict: float


MergeMatrices: TypeAlias = Callable[[Sequence[torch.Tensor]], MatrixMerge]  # float64, one of each contribution


@dataclass(frozen=True, slots=True)
class FactorMerge:
    """The merged ΔW, every parameter but the base applied, and what happened on the way where values were compared."""

    matrix: LowRank
    trimmed: tuple[float, ...] | None = None
    sign_conflict: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorMethod:
    """A method that merges low-rank task vectors by their factors.

    ``merge``: from each contribution's matrix (of rank 0 where it changes nothing) to the merged one. It is handed what
    merges small matrices by the method ``dense``, which is also what merges tensors that are not low-rank.
    """

    name: str
    merge: Callable[[TensorPlan, Sequence[LowRank], MergeMatrices], FactorMerge]
    dense: Callable[[TensorPlan], VoteMethod]


Method: TypeAlias = VoteMethod | BlendMethod | FactorMethod


def no_needs(_tensor: TensorPlan) -> Needs:
    return Needs()


def keep_everything(_tensor: TensorPlan, _contribution: Contribution, numel: int) -> int:
    return numel


def own_weights(tensor: TensorPlan) -> list[float]:
    """Each contribution's parameter ``weight``, in the order of the sources."""
    return [contribution.parameters["weight"] for contribution in tensor.contributions]
