"""Methods that trim each task vector and merge by an elected sign: ``ties`` and its dialects.

TIES-Merging, Yadav et al. 2023, arXiv 2306.01708. For each parameter, over the N sources that take part in
the tensor:

    trim    t_i = δ_i where |δ_i| is among the k largest, else 0 (rescaled to the L1 norm before, if wanted)
    elect   s = mass: sign Σ t_i · count: the sign more sources hold · unanimous: the one sign all hold
            · quorum: as count, where at least q·N of them hold it; no such sign, no change
    merge   result = base + λ · Σ_{sign t_i = s} t_i / divisor

The weight w_i multiplies δ_i before the trim (``scale``), t_i before the election (``vote``) or only the terms
of the sum (``merge``). The divisor is the number of agreeing sources, the sum of their weights, or the number of
all sources; without ``normalize`` it is 1. ``quorum`` always divides by the agreeing ones.
"""

from __future__ import annotations

import math
from typing import Literal, cast

from app.planning.plan import Contribution, TensorPlan
from worker.engine.kernels.signature import Divisor, Elect, Rule
from worker.engine.methods.method import Needs, VoteMethod, own_weights


def _needs(tensor: TensorPlan) -> Needs:
    """``majority`` only where the vote can be even: a unanimous one cannot."""
    chosen = tensor.parameters
    scope = cast(Literal["tensor", "model"], chosen["trim_scope"])
    untrimmed = all(contribution.parameters["density"] >= 1 for contribution in tensor.contributions)
    return Needs(
        # Over the whole model one source may be trimmed elsewhere, so all of its values count towards its k.
        trim="none" if scope == "tensor" and untrimmed else scope,
        rescale=bool(chosen["rescale"]),
        majority=chosen["zero_sum"] == "majority" and chosen["elect"] != "unanimous",
        prescale=chosen["weights"] == "scale",
    )


def _weights(tensor: TensorPlan) -> list[float]:
    if tensor.parameters["weights"] == "scale":
        return [1.0] * len(tensor.contributions)
    return own_weights(tensor)


def _keep_count(tensor: TensorPlan, contribution: Contribution, numel: int) -> int:
    """k = int(density · numel), at least ``min_keep`` where the density is above 0."""
    density = contribution.parameters["density"]
    if density <= 0:
        return 0
    least = int(tensor.parameters["min_keep"])
    return min(numel, max(least, int(density * numel)))


def _rule(tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule:
    """``sources`` matters only where it is the divisor (``article``): an absent source is then a zero."""
    chosen = tensor.parameters
    present = len(tensor.contributions)
    elect = cast(Elect, chosen["elect"])
    required = 0
    if elect == "quorum":
        # 0.07 · 100 is 7.000000000000001 in float64: the slack keeps a whole number whole.
        required = math.ceil(float(chosen["quorum"]) * present - 1e-9)
    return Rule(
        scale=float(chosen["lambda"]),
        elect=elect,
        weigh_votes=chosen["weights"] != "merge",
        divisor=_divisor(tensor),
        zero_sign=zero_sign,
        required=required,
        sources=sources if chosen["divisor"] == "sources" else present,
    )


def _divisor(tensor: TensorPlan) -> Divisor:
    if tensor.parameters["elect"] == "quorum":
        return "agreeing"
    return cast(Divisor, tensor.parameters["divisor"]) if tensor.parameters["normalize"] else "none"


TIES = VoteMethod(name="ties", needs=_needs, weights=_weights, keep_count=_keep_count, rule=_rule)
