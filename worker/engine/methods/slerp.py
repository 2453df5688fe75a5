"""Spherical interpolation between two models: ``slerp`` and ``nuslerp``. Shoemake 1985, *Animating rotation with
quaternion curves*.

    slerp(t; a, b) = [sin((1-t)θ)·a + sin(tθ)·b] / sin θ,    θ the angle between a and b

Where a and b are (nearly) parallel this is (1-t)·a + t·b. ``slerp`` goes from the base to the source. ``nuslerp`` goes
from the first source to the second, t being the second's share of the weights; around the base, where one is named.
mergekit's names: ``nuslerp_row_wise`` takes the vectors along the first axis, without it they run along the last.
"""

from __future__ import annotations

import torch

from app.planning.plan import TensorPlan
from worker.engine.methods.combination import around_base, combination, lengths
from worker.engine.methods.method import own_weights
from worker.engine.reductions import Grouping

# mergekit's bounds: beyond this cosine slerp is linear, below these norms a vector is not scaled to 1
PARALLEL = 0.9995
SMALLEST_SLERP = 1e-8
SMALLEST_NUSLERP = 1e-7
SMALLEST_WEIGHTS = 1e-6


def _slerp(tensor: TensorPlan, products: torch.Tensor) -> torch.Tensor:
    norms = lengths(products)
    cosine = _cosine(products, torch.where(norms > SMALLEST_SLERP, norms, 1.0))
    return _interpolated(cosine, float(tensor.parameters["t"]), linear=cosine.abs() > PARALLEL)


def _nuslerp(tensor: TensorPlan, products: torch.Tensor) -> torch.Tensor:
    first, second = own_weights(tensor)
    t = 0.5 if abs(first + second) < SMALLEST_WEIGHTS else second / (first + second)
    cosine = _cosine(products, lengths(products).clamp(min=SMALLEST_NUSLERP))
    # parallel as far as float32 can tell: beyond it sin θ is noise
    return _interpolated(cosine, t, linear=cosine.abs().float() >= 1)


def _cosine(products: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return (products[:, 0, 1] / (norms[:, 0] * norms[:, 1])).clamp(-1, 1)


def _interpolated(cosine: torch.Tensor, t: float, *, linear: torch.Tensor) -> torch.Tensor:
    """The factors of both vectors, float64 (groups, 2)."""
    angle = cosine.acos()
    first = torch.where(linear, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    second = torch.where(linear, t, (t * angle).sin() / angle.sin())
    return torch.stack([first, second], dim=1)


def _nuslerp_grouping(tensor: TensorPlan) -> Grouping:
    if tensor.parameters["nuslerp_flatten"]:
        return Grouping.whole(tensor.shape)
    along = Grouping.columns if tensor.parameters["nuslerp_row_wise"] else Grouping.rows
    return along(tensor.shape)


SLERP = combination("slerp", _slerp, vectors=lambda _: "both")
NUSLERP = combination("nuslerp", _nuslerp, vectors=around_base, grouping=_nuslerp_grouping)
