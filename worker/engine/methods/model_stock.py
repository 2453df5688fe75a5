"""Model Stock. Jang et al. 2024, arXiv 2403.19522.

    result = base + t · mean δ_i,    t = N·c / (1 + (N-1)·c),    c the mean cosine of all pairs of δ

over the whole tensor, or with ``filter_wise`` for each vector along the last axis. Where the denominator vanishes
the base stays (mergekit's rule).
"""

from __future__ import annotations

import torch

from app.planning.plan import TensorPlan
from worker.engine.methods.combination import combination, lengths
from worker.engine.reductions import Grouping

SMALLEST_PRODUCT = 1e-6  # of two norms, in a cosine's denominator
SINGULAR = 1e-6


def _model_stock(_tensor: TensorPlan, products: torch.Tensor) -> torch.Tensor:
    count = products.shape[1]
    norms = lengths(products)
    cosines = (products / (norms[:, :, None] * norms[:, None, :]).clamp(min=SMALLEST_PRODUCT)).clamp(-1, 1)
    first, second = torch.triu_indices(count, count, offset=1)
    cosine = cosines[:, first, second].mean(1)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < SINGULAR
    t = torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))
    return (t / count)[:, None].expand(-1, count)


def _grouping(tensor: TensorPlan) -> Grouping:
    return Grouping.rows(tensor.shape) if tensor.parameters["filter_wise"] else Grouping.whole(tensor.shape)


MODEL_STOCK = combination("model_stock", _model_stock, vectors=lambda _: "deltas", grouping=_grouping)
