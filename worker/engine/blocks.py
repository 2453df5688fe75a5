"""Cutting tensors into blocks, and running blocks side by side with their results in order."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TypeVar

import torch

from app.planning.budgets import BLOCK_VALUES, RESULTS_AHEAD

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Block:
    """Whole rows of one tensor, as the flat values ``start`` up to ``stop``."""

    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def row_width(shape: tuple[int, ...]) -> int:
    """Values in a row: the product of the trailing axes, fewer of them until a row fits a block, at least the last."""
    axis = 1
    while axis < len(shape) - 1 and math.prod(shape[axis:]) > BLOCK_VALUES:
        axis += 1
    return math.prod(shape[axis:])


def cut(shape: tuple[int, ...]) -> tuple[Block, ...]:
    """The blocks of a tensor, by its shape alone, so that no result can depend on threads or memory.

    About ``BLOCK_VALUES`` values each and at least one row; a scalar is one block, an empty tensor none.
    """
    values, width = math.prod(shape), row_width(shape)
    if values == 0:
        return ()
    step = max(1, BLOCK_VALUES // width) * width
    return tuple(Block(index, start, min(start + step, values)) for index, start in enumerate(range(0, values, step)))


class Crew:
    """A fixed number of threads, each doing whole blocks; torch is held to one thread a block meanwhile.

    torch's thread count is a setting of the process: it is put back on leaving. One merge at a time a process.
    """

    def __init__(self, threads: int = 0) -> None:
        """``threads`` 0: every core this process may use."""
        self.threads = threads or len(os.sched_getaffinity(0))
        self.ahead = RESULTS_AHEAD * self.threads

    def __enter__(self) -> Crew:
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # OpenMP keeps the count per thread, so each of ours sets its own too
        self._pool = ThreadPoolExecutor(
            self.threads, thread_name_prefix="block", initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def in_order(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``work`` of each item, in the items' order, at most ``ahead`` items begun beyond the one handed out.

        ``items`` is drawn on the caller's thread, so it may wait for room. When the caller stops early, or an item
        fails, what was begun is waited for, so that no thread still touches shared memory afterwards.
        """
        source = iter(items)
        begun: deque[Future[Result]] = deque()
        try:
            while True:
                for item in islice(source, self.ahead - len(begun)):
                    begun.append(self._pool.submit(work, item))
                if not begun:
                    return
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
            wait(begun)
