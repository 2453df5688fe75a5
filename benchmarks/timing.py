"""How long kernels take, on threads of the CPU or on a GPU. Imports nothing that a bare GPU machine lacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch

REPEATS = 5


def seconds_of(work: Callable[[int], object], device: str, threads: int, *, pool: bool = True) -> float:
    """The median time in which every thread has done its part once."""
    if not pool or device == "cuda":
        return median(timed(lambda: [work(thread) for thread in range(threads)], device))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as crew:
        return median(timed(lambda: list(crew.map(work, range(threads))), device))


def timed(work: Callable[[], object], device: str) -> list[float]:
    """Seconds of each of ``REPEATS`` calls, until the device has done what it was given."""
    times = []
    for _ in range(REPEATS + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return times[1:]  # the first touches memory and compiles


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
