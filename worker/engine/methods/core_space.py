"""Methods of low-rank task vectors: ``core_space``, ``tsv``, ``iso_c``, ``knots``. None of them forms Δ.

A source's Δ_t = B_t A_t is (out, in), with its scale in B_t; R = Σ r_t. All small factorisations are in float64, on one
thread, and keep only the directions above rounding, so that sources which repeat or cancel each other leave nothing to
chance.

    core_space  U, V: the singular vectors of [B_1 … B_T] and of [A_1; …; A_T]; M_t = Uᵀ B_t A_t V holds Δ_t without
                loss; ΔW = U merge(M_1 … M_T) Vᵀ. Panariello et al. 2025, Core Space, arXiv 2509.17786.
    tsv         Δ_t = U_t S_t V_tᵀ; U⊥, V⊥: the polar factors of [U_1 … U_T] and [V_1 … V_T]; ΔW = λ U⊥ S V⊥ᵀ.
                Gargiulo et al. 2025, Task singular vectors, arXiv 2412.00081.
    iso_c       Σ Δ_t = U S Vᵀ; ΔW = λ · mean(S) · U Vᵀ. Marczak et al. 2025, No task left behind, arXiv 2502.04959.
    knots       [Δ_1 … Δ_T] = U S [V_1ᵀ … V_Tᵀ]; ΔW = U merge(S V_1ᵀ … S V_Tᵀ). Stoica et al. 2024, KnOTS,
                arXiv 2410.19735.

What is not low-rank in a tensor (norms, biases, full models) is merged densely, by ``dense``: ``core_space`` and
``knots`` by the method that they wrap, ``tsv`` and ``iso_c`` by the mean of the task vectors, as their papers merge
what is no matrix. The planner refuses dense matrices in all but ``core_space``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from app.planning.plan import TensorPlan
from worker.engine.kernels.signature import Rule
from worker.engine.low_rank import LowRank, basis_of, polar_factor, singular
from worker.engine.methods.consensus import TIES
from worker.engine.methods.linear import TASK_ARITHMETIC
from worker.engine.methods.method import (
    FactorMerge,
    FactorMethod,
    MergeMatrices,
    VoteMethod,
    keep_everything,
    no_needs,
    own_weights,
)

# A weighted mean is task arithmetic with `normalize`, which is what the planner makes of `linear`.
_WRAPPED: Mapping[str, VoteMethod] = {"ties": TIES, "task_arithmetic": TASK_ARITHMETIC, "linear": TASK_ARITHMETIC}


def _core_space(_tensor: TensorPlan, sources: Sequence[LowRank], merge: MergeMatrices) -> FactorMerge:
    left = basis_of(torch.cat([source.left for source in sources], 1))
    right = basis_of(torch.cat([source.right for source in sources], 0).T)
    merged = merge([(left.T @ source.left) @ (source.right @ right) for source in sources])
    return FactorMerge(LowRank(left @ merged.values, right.T), merged.trimmed, merged.sign_conflict)


def _knots(_tensor: TensorPlan, sources: Sequence[LowRank], merge: MergeMatrices) -> FactorMerge:
    # right factors by QR, each apart: [Δ_1 … Δ_T] = [L_1 R_1 … L_T R_T] blkdiag(Q_1 … Q_T)ᵀ
    halves = [torch.linalg.qr(source.right.T) for source in sources]
    reduced = torch.cat([source.left @ half.R.T for source, half in zip(sources, halves, strict=True)], 1)
    left = basis_of(reduced)
    aligned = [(left.T @ source.left) @ source.right for source in sources]  # S V_tᵀ = Uᵀ Δ_t
    merged = merge(aligned)
    return FactorMerge(LowRank(left, merged.values), merged.trimmed, merged.sign_conflict)


def _tsv(tensor: TensorPlan, sources: Sequence[LowRank], _merge: MergeMatrices) -> FactorMerge:
    parts = [singular(source.times(weight)) for source, weight in zip(sources, own_weights(tensor), strict=True)]
    left = polar_factor(torch.cat([part.U for part in parts], 1))
    right = polar_factor(torch.cat([part.V for part in parts], 1))
    values = torch.cat([part.S for part in parts]) * float(tensor.parameters["lambda"])
    return FactorMerge(LowRank(left * values, right.T))


def _iso_c(tensor: TensorPlan, sources: Sequence[LowRank], _merge: MergeMatrices) -> FactorMerge:
    weights = own_weights(tensor)
    left = torch.cat([source.left * weight for source, weight in zip(sources, weights, strict=True)], 1)
    right = torch.cat([source.right for source in sources], 0)
    found = singular(LowRank(left, right))
    mean = float(found.S.mean()) if len(found.S) else 0.0
    return FactorMerge(LowRank(found.U * (mean * float(tensor.parameters["lambda"])), found.V.T))


def _wrapped(tensor: TensorPlan) -> VoteMethod:
    return _WRAPPED[str(tensor.parameters["inner"])]


def _mean_rule(tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule:  # noqa: ARG001
    return Rule(scale=float(tensor.parameters["lambda"]), divisor="sources", sources=sources)


_MEAN = VoteMethod(name="mean", needs=no_needs, weights=own_weights, keep_count=keep_everything, rule=_mean_rule)

CORE_SPACE = FactorMethod(name="core_space", merge=_core_space, dense=_wrapped)
TSV = FactorMethod(name="tsv", merge=_tsv, dense=lambda _tensor: _MEAN)
ISO_C = FactorMethod(name="iso_c", merge=_iso_c, dense=lambda _tensor: _MEAN)
KNOTS = FactorMethod(name="knots", merge=_knots, dense=lambda _tensor: TIES)
