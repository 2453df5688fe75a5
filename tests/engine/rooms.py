"""The rooms of kernels as tests use them: ``cuda`` too where there is no GPU, by Triton's interpreter."""

from __future__ import annotations

import torch

from worker.engine.kernels import Kernels, Room, load


def room(name: Room) -> Kernels:
    """As ``load``; without a GPU, ``cuda`` is the same kernels interpreted (tests/__init__.py asks for that)."""
    if name == "cuda" and not torch.cuda.is_available():
        from worker.engine.kernels.cuda import CudaKernels

        return CudaKernels(torch.device("cpu"))
    return load(name)
