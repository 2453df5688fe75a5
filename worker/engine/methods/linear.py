"""Weighted sums: ``linear`` and ``task_arithmetic``. Nothing is trimmed and no sign is elected.

With δ_i = x_i - base and w_i the weights of the N sources that the plan counts in the tensor:

    linear            result = Σ w_i x_i [/ Σ w_i]
    task_arithmetic   result = base + λ · Σ w_i δ_i [/ Σ w_i]

Model soups: Wortsman et al. 2022, arXiv 2203.05482. Task arithmetic: Ilharco et al. 2023, arXiv 2212.04089.

The divisions in brackets are made where ``normalize`` is true; a sum of weights below 1e-8 in magnitude
counts as 1. A source that leaves a tensor as it is has δ = 0 there and its weight still counts.
"""

from __future__ import annotations

from typing import Literal

from app.planning.plan import TensorPlan
from worker.engine.kernels.signature import SMALLEST_DIVISOR, Divisor, Rule
from worker.engine.methods.method import VoteMethod, keep_everything, no_needs, own_weights


def _linear_rule(tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule:  # noqa: ARG001
    """Σ w (base + δ) = (Σ w) base + Σ w δ; where normalised, both are divided and the base counts once."""
    total = sum(own_weights(tensor))
    if not tensor.parameters["normalize"]:
        return Rule(base=total, divisor="none")
    divisor = total if abs(total) >= SMALLEST_DIVISOR else 1.0
    return Rule(base=total / divisor, divisor="weights")


def task_arithmetic_rule(tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule:  # noqa: ARG001
    divisor: Divisor = "weights" if tensor.parameters["normalize"] else "none"
    return Rule(scale=float(tensor.parameters["lambda"]), divisor=divisor)


LINEAR = VoteMethod(name="linear", needs=no_needs, weights=own_weights, keep_count=keep_everything, rule=_linear_rule)
TASK_ARITHMETIC = VoteMethod(
    name="task_arithmetic",
    needs=no_needs,
    weights=own_weights,
    keep_count=keep_everything,
    rule=task_arithmetic_rule,
)
