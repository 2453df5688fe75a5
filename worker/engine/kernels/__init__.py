"""The kernels: trim, elect, merge, over blocks of one tensor; the same numbers in every room."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from app.errors import MergeyardError
from worker.engine.kernels.cpu import CpuKernels
from worker.engine.kernels.reference import ReferenceKernels
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS, KEEP_ALL, Difference, Kernels, Product, Rule, Trim

__all__ = ["Kernels", "Room", "load", "warm_up"]

Room = Literal["auto", "cpu", "cuda", "reference"]


def load(room: Room) -> Kernels:
    """The kernels of ``room``; ``auto`` is the fastest this machine has: ``cuda`` where there is a GPU, else ``cpu``.

    Raises ``not_supported`` for ``cuda`` where it cannot be had, saying what is missing.
    """
    if room == "reference":
        return ReferenceKernels()
    if room != "cpu":
        lack = _lack_of_cuda()
        if lack is None:
            from worker.engine.kernels.cuda import CudaKernels  # noqa: PLC0415 — only a GPU's machine need have triton

            return CudaKernels(torch.device("cuda"))
        if room == "cuda":
            raise MergeyardError("not_supported", f"{lack}, or use the device cpu or auto.")
    return CpuKernels()


def _lack_of_cuda() -> str | None:
    """What keeps the ``cuda`` room from working, and what to do about it; None where nothing does."""
    if torch.version.cuda is None:
        return "This torch is a build for the CPU: install its CUDA build (TORCH_INDEX=<wheel index> make setup)"
    if not torch.cuda.is_available():
        return "torch finds no GPU: see that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
    if find_spec("triton") is None:
        return "What runs on the GPU needs triton: install the version that this torch requires"
    return None


def warm_up(kernels: Kernels) -> None:
    """Run every kernel once on a few values, so that what is compiled on first use is compiled before work comes."""
    delta = torch.tensor([0.0, 1.0, -2.0, 3.0]).repeat(1024)  # whole tiles, as most blocks are
    half = delta.bfloat16()
    product = Product(kernels.place(delta[:8, None]), kernels.place(delta[None, :512]), 1.0)
    rule = Rule(elect="mass")
    kernels.form(product, torch.empty_like(delta))
    kernels.histogram(delta, torch.zeros(COARSE_BINS, dtype=torch.int64), None)
    kernels.histogram(delta, torch.zeros(FINE_BINS, dtype=torch.int64), 0)
    kernels.collect([product], [(0, 1)], torch.empty(1, len(delta), dtype=torch.int32))
    kernels.count_equal(delta, 0)
    kernels.kept_l1(delta, KEEP_ALL)
    kernels.elected_balance([delta], [KEEP_ALL], [1.0], rule)
    trims = [Trim(threshold=0x3F80_0000, equals=1), KEEP_ALL]  # 1.0: equal magnitudes are divided
    for base in (delta, half):
        kernels.merge(base, [product, Difference(half, base)], trims, [1.0, 1.0], rule, torch.empty_like(base))
