"""The kernels: trim, elect, merge, over blocks of one tensor; the same numbers in every room."""

from __future__ import annotations

from typing import Literal

import torch

from app.errors import MergeyardError
from worker.engine.kernels.cpu import CpuKernels
from worker.engine.kernels.reference import ReferenceKernels
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS, KEEP_ALL, Difference, Kernels, Product, Rule

__all__ = ["Kernels", "Room", "load", "warm_up"]

Room = Literal["auto", "cpu", "cuda", "reference"]


def load(room: Room) -> Kernels:
    """The kernels of ``room``; ``auto`` is the fastest this machine has.

    Raises ``not_supported`` for ``cuda``.
    """
    if room == "reference":
        return ReferenceKernels()
    if room == "cuda":
        raise MergeyardError("not_supported", "This version merges on the CPU only; use the device cpu or auto.")
    return CpuKernels()


def warm_up(kernels: Kernels) -> None:
    """Run every kernel once on four values, so that what is compiled on first use is compiled before work comes."""
    delta = torch.tensor([0.0, 1.0, -2.0, 3.0])
    half = delta.bfloat16()
    product = Product(kernels.place(delta[:2, None]), kernels.place(delta[None, :2]), 1.0)
    rule = Rule(elect="mass")
    kernels.form(product, torch.empty_like(delta))
    kernels.histogram(delta, torch.zeros(COARSE_BINS, dtype=torch.int64), None)
    kernels.histogram(delta, torch.zeros(FINE_BINS, dtype=torch.int64), 0)
    kernels.collect([product], [(0, 1)], torch.empty(1, 4, dtype=torch.int32))
    kernels.count_equal(delta, 0)
    kernels.kept_l1(delta, KEEP_ALL)
    kernels.elected_balance([delta], [KEEP_ALL], [1.0], rule)
    for base in (delta, half):
        kernels.merge(base, [product, Difference(half, base)], [KEEP_ALL] * 2, [1.0] * 2, rule, torch.empty_like(base))
