"""The ``cuda`` room, one operation a file: the kernel first, then what launches it."""

from __future__ import annotations

from worker.engine.kernels.cuda.room import CudaKernels

__all__ = ["CudaKernels"]
