"""Where one thread's calls work: a stream of its own, and buffers that stay from call to call."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator

import numpy as np
import numpy.typing as npt
import torch

_ALIGNED = 256  # bytes; as CUDA aligns what it allocates


class Workspace:
    """Use from one thread. ``device`` cpu: everything lies in the host's memory, where Triton's interpreter works.

    Copies of different threads' streams overlap each other and the kernels, so that with a few threads the bus both
    ways and the GPU are busy at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[torch.Tensor] = []
        self._taken = 0
        self._pages: list[torch.Tensor] = []
        self._written = 0
        self._staged: dict[Hashable, torch.Tensor] = {}
        self._held: list[torch.Tensor] = []
        self._returning: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call: what it stages and takes is its own until it ends, when what it returns lies in the host."""
        try:
            if self._stream is None:
                yield
                self._return()
                return
            # what the caller wrote on its own stream comes first
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                yield
                self._return()
        finally:
            if self._stream is not None:
                self._stream.synchronize()
            self._taken = self._written = 0
            self._staged.clear()
            self._held.clear()
            self._returning.clear()

    def staged(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the device: themselves where they lie there, else a copy, one a call."""
        if values.device.type == self.device.type:
            return values
        key = (values.data_ptr(), values.dtype, values.shape, values.stride())
        if key not in self._staged:
            copy = self.empty(values.numel(), values.dtype).view(values.shape)
            copy.copy_(values, non_blocking=True)
            self._staged[key] = copy
        return self._staged[key]

    def result(self, out: torch.Tensor) -> torch.Tensor:
        """Where to write what ``out`` shall hold when the call ends."""
        if out.device.type == self.device.type:
            return out
        own = self.empty(out.numel(), out.dtype).view(out.shape)
        self._returning.append((out, own))
        return own

    def upload(self, entries: npt.NDArray[np.int64]) -> torch.Tensor:
        """A small table on the device, by way of page-locked memory."""
        if self._stream is None:
            return torch.from_numpy(entries)
        if self._written == len(self._pages):
            self._pages.append(torch.empty(0, dtype=torch.uint8))
        if len(self._pages[self._written]) < entries.nbytes:
            self._pages[self._written] = torch.empty(entries.nbytes, dtype=torch.uint8, pin_memory=True)
        page = self._pages[self._written][: entries.nbytes].view(torch.int64).view(entries.shape)
        self._written += 1
        page.numpy()[:] = entries
        table = self.empty(entries.size, torch.int64).view(entries.shape)
        table.copy_(page, non_blocking=True)
        return table

    def empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """(size,) on the device, uninitialised, until the call ends."""
        needed = -(-size * dtype.itemsize // _ALIGNED) * _ALIGNED
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if len(self._buffers[self._taken]) < needed:
            self._buffers[self._taken] = torch.empty(0, dtype=torch.uint8, device=self.device)  # never both at once
            self._buffers[self._taken] = torch.empty(needed, dtype=torch.uint8, device=self.device)
        buffer = self._buffers[self._taken]
        self._taken += 1
        return buffer[: size * dtype.itemsize].view(dtype)

    def zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return self.empty(size, dtype).zero_()

    def hold(self, *values: torch.Tensor) -> None:
        """Keep what a table names only by its address until the call ends."""
        self._held.extend(values)

    def _return(self) -> None:
        for out, own in self._returning:
            out.copy_(own, non_blocking=True)
