"""Means of many models on a sphere: ``multislerp`` and ``karcher``.

Each model is a direction u_i = x_i/‖x_i‖ and a norm:

    multislerp   (Σ w_i‖x_i‖) · m/‖m‖ with m = Σ w_i u_i; around the base, where one is named
    karcher      mean of ‖x_i‖ · μ, where μ minimises the sum of squared angles to the u_i

multislerp is Goddard 2024, *Multi-SLERP* (goddard.blog): it goes from the weighted mean along the weighted sum of the
tangents there, which is zero, so what is left is the mean itself. The Karcher mean is Karcher 1977, *Riemannian center
of mass*; for models arXiv 2603.04972: from the Euclidean mean, at most ``max_iter`` steps along the mean of the
logarithm maps, until one is shorter than ``tol``.
"""

from __future__ import annotations

import math

import torch

from app.errors import MergeyardError
from app.planning.plan import TensorPlan
from worker.engine.methods.combination import around_base, combination, lengths
from worker.engine.methods.method import own_weights

SMALLEST_SINE = 1e-12  # an angle of π has no one direction: such a model pulls nowhere


def _multislerp(tensor: TensorPlan, products: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(own_weights(tensor), dtype=torch.float64)
    eps = float(tensor.parameters["eps"])
    if len(weights) == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if tensor.parameters["normalize_weights"]:
        weights = weights / weights.sum()
    norms = lengths(products)[0]
    shares = weights / (norms + eps)  # of each x in m
    length = float(_square(shares, products[0]).sqrt())
    if length >= eps:
        return (float(weights @ norms) / length * shares)[None]
    if len(weights) == 2 or not norms.any():
        return weights[None]
    raise MergeyardError(
        "parameter_invalid",
        f"The weighted sources cancel out in tensor {tensor.name}, so their mean has no direction there; choose other "
        "weights.",
        where="models",
    )


def _karcher(tensor: TensorPlan, products: torch.Tensor) -> torch.Tensor:
    norms = lengths(products)[0]
    tol = float(tensor.parameters["tol"])
    if len(norms) == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    known = norms > tol
    if not known.any():
        return torch.zeros(1, len(norms), dtype=torch.float64)
    # a zero vector has no direction: it takes part in the mean norm alone
    inverse = torch.where(known, 1 / torch.where(known, norms, 1.0), 0.0)
    cosines = products[0] * inverse[:, None] * inverse
    mean = _karcher_mean(cosines, known, max_iter=int(tensor.parameters["max_iter"]), tol=tol)
    return (norms.mean() * mean * inverse)[None]


def _karcher_mean(cosines: torch.Tensor, known: torch.Tensor, *, max_iter: int, tol: float) -> torch.Tensor:
    """μ as coefficients of the directions: float64 (K,)."""
    share = known.double() / known.sum()
    length = float(_square(share, cosines).sqrt())
    mean = share / length if length >= tol else torch.eye(len(share), dtype=torch.float64)[known.nonzero()[0, 0]]
    for _ in range(max_iter):
        to_mean = (cosines @ mean).clamp(-1, 1)
        angle = to_mean.acos()
        sine = angle.sin()
        pulls = known & (angle >= tol) & (sine >= SMALLEST_SINE)
        weight = torch.where(pulls, share * angle / torch.where(pulls, sine, 1.0), 0.0)
        tangent = weight - float(weight @ to_mean) * mean
        step = float(_square(tangent, cosines).sqrt())
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        length = float(_square(mean, cosines).sqrt())
        if length > tol:
            mean = mean / length
    return mean


def _square(coefficients: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """‖Σ c_k v_k‖², which rounding may not make negative."""
    return (coefficients @ products @ coefficients).clamp(min=0)


MULTISLERP = combination("multislerp", _multislerp, vectors=around_base)
KARCHER = combination("karcher", _karcher, vectors=lambda _: "sources")
