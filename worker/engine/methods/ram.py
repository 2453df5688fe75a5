"""Reinforced Agent Merging: ``ram`` and ``ramplus_tl``. arXiv 2601.13572.

A source changes a parameter where |δ| > ε. What several change is averaged over those that do. What one alone changes
is taken as it is; ``ramplus_tl`` multiplies it by 1 + r·min(α, shared/alone), counted over the parameters of the tensor
that the source changes together with others, and alone.
"""

from __future__ import annotations

import torch

from worker.engine.methods.method import Blend, Blended, BlendMethod
from worker.engine.reductions import total
from worker.engine.views import BlockView, TensorPass


def _ram(tensor: TensorPass) -> Blend:
    return _merging(tensor, torch.ones(len(tensor.contributions), 1))


def _ramplus_tl(tensor: TensorPass) -> Blend:
    chosen = tensor.tensor.parameters
    epsilon = float(chosen["epsilon"])

    def shared_and_alone(view: BlockView) -> torch.Tensor:
        changed = view.deltas.abs() > epsilon
        together = changed.sum(0) > 1
        return torch.stack([(changed & together).sum(1), (changed & ~together).sum(1)])

    shared, alone = total(tensor, shared_and_alone)
    overlap = (shared / alone.clamp(min=epsilon)).clamp(0, float(chosen["alpha"]))
    return _merging(tensor, (1 + float(chosen["r"]) * overlap).float()[:, None])


def _merging(tensor: TensorPass, alone_factor: torch.Tensor) -> Blend:
    epsilon = float(tensor.tensor.parameters["epsilon"])

    def blend(view: BlockView) -> Blended:
        changed = view.deltas.abs() > epsilon
        count = changed.sum(0)
        deltas = torch.where(changed, view.deltas, 0.0)
        merged = torch.where(count > 1, deltas / count.clamp(min=1), deltas * alone_factor)
        return Blended(view.base + merged.sum(0), changed)

    return blend


RAM = BlendMethod(name="ram", prepare=_ram)
RAMPLUS_TL = BlendMethod(name="ramplus_tl", prepare=_ramplus_tl)
