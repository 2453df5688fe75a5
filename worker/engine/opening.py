"""Opening tensors ahead: the thresholds of the next one are found while the blocks of the last are merged.

Both share the crew, so no core waits for the last block of a tensor, nor for what one thread does between its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import torch

from app.planning.plan import TensorPlan
from worker.engine.blocks import Block
from worker.engine.tensors import BlockWork
from worker.engine.trimming import Pulse

_SLICE_SECONDS = 0.2  # between two checks while the next tensor is waited for


def opened_ahead(
    tensors: Sequence[TensorPlan], open_tensor: Callable[[TensorPlan, Pulse], BlockWork], check: Callable[[], None]
) -> Generator[tuple[TensorPlan, BlockWork], None, None]:
    """Each tensor with what merges its blocks, in order, at most one opened beyond the one handed out.

    ``open_tensor`` runs on a thread of its own and calls its pulse after every block; ``check`` is called on the
    caller's while it waits. What either raises passes through, and so does what stops the caller: close the iterator.
    """
    stop = Event()

    def pulse(_tensor: TensorPlan, _block: Block) -> None:
        if stop.is_set():
            raise _StoppedError

    with ThreadPoolExecutor(1, thread_name_prefix="opening", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            coming = pool.submit(open_tensor, tensors[0], pulse) if tensors else None
            for index, tensor in enumerate(tensors):
                assert coming is not None
                work = _awaited(coming, check)
                if index + 1 < len(tensors):
                    coming = pool.submit(open_tensor, tensors[index + 1], pulse)
                yield tensor, work
        finally:
            stop.set()


class _StoppedError(Exception):
    """Nobody wants the tensor any more."""


def _awaited(coming: Future[BlockWork], check: Callable[[], None]) -> BlockWork:
    while True:
        try:
            return coming.result(_SLICE_SECONDS)
        except TimeoutError:
            if coming.done():  # since then, or with a TimeoutError of its own
                return coming.result()
            check()
