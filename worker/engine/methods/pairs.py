"""Methods that take the base and one other model: ``nearswap``, ``arcee_fusion``; and ``passthrough``, which takes one.

    nearswap       base + min(1, t/|δ|)·δ: small differences are taken whole, large ones up to t
    arcee_fusion   base + δ where |δ|·KL is at least median + 1.5·(upper - lower quartile), else the base;
                   KL of the softmax of the source's row to the base's
    passthrough    scale · x

nearswap is alchemonaut's (QuartetAnemoi-70B), arcee_fusion Arcee's, both by way of mergekit. The quartiles are exact,
the lower of two where they fall between; mergekit samples tensors above a million values.
"""

from __future__ import annotations

import math

import torch

from worker.engine.methods.method import Blend, Blended, BlendMethod
from worker.engine.ranking import largest
from worker.engine.views import BlockView, TensorPass

SMALLEST_DIFFERENCE = 1e-6  # nearswap divides by no less (mergekit's rule)
SOFTMAX_FLOOR = 1e-8


def _nearswap(tensor: TensorPass) -> Blend:
    t = float(tensor.tensor.parameters["t"])

    def blend(view: BlockView) -> Blended:
        delta = view.deltas[0]
        share = (t / delta.abs().clamp(min=SMALLEST_DIFFERENCE)).clamp(0, 1)
        return Blended(view.base + share * delta)

    return blend


def _arcee_fusion(tensor: TensorPass) -> Blend:
    numel = math.prod(tensor.tensor.shape)
    ranks = [(numel - 1) * quarter // 4 for quarter in (1, 2, 3)]  # from 0, of the smallest
    [cuts] = largest(tensor, lambda view: _importance(view)[None], [[numel - rank for rank in ranks]])
    lower, median, upper = (torch.tensor(cut.value) for cut in cuts)
    threshold = median + 1.5 * (upper - lower)

    def blend(view: BlockView) -> Blended:
        kept = _importance(view) >= threshold
        return Blended(view.base + view.deltas[0] * kept, kept)

    return blend


def _importance(view: BlockView) -> torch.Tensor:
    """|δ|·KL, float32 (n,). In a tensor of one axis KL is one factor of all values, which changes no order.

    KL is of the order of δ² and its terms of the order of δ: of two close models float32 would show rounding alone.
    """
    delta = view.deltas[0].abs()
    if len(view.tensor.shape) < 2:
        return delta
    width = view.tensor.shape[-1]
    rows = (values.view(-1, width).double() for values in (view.sources[0], view.base))
    source, base = (values.softmax(1) + SOFTMAX_FLOOR for values in rows)
    divergence = (source * (source / base).log()).sum(1, keepdim=True)
    return (delta.view(-1, width) * divergence.clamp(min=0)).float().view(-1)  # below 0 it is rounding


def _passthrough(tensor: TensorPass) -> Blend:
    scale = tensor.contributions[0].parameters["scale"]
    return lambda view: Blended(view.sources[0] if scale == 1 else view.sources[0] * scale)


NEARSWAP = BlendMethod(name="nearswap", prepare=_nearswap)
ARCEE_FUSION = BlendMethod(name="arcee_fusion", prepare=_arcee_fusion)
PASSTHROUGH = BlendMethod(name="passthrough", prepare=_passthrough)
