"""A worker whose arithmetic takes its time, so that a tiny merge can be caught in the middle. Run as a module.

Where ``MERGEYARD_TEST_FAULT`` names a file, the next block fails as a GPU's would, with the error the file names. Where
``MERGEYARD_TEST_STARTING`` names one, it appears when the child begins to start, which then takes START_SECONDS.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from celery import current_app
from celery.signals import worker_process_init

import worker.tasks  # noqa: F401 — the real doorbell, which this module slows down
from app.records.bell import TASK
from app.settings import Settings
from worker.celery import run_worker

START_SECONDS = 600.0
SECONDS = 0.06  # per block; a tiny merge has 14


FAULT = "MERGEYARD_TEST_FAULT"
STARTING = "MERGEYARD_TEST_STARTING"


class SlowKernels:
    """Kernels that sleep before they merge a block."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def merge(self, *arguments: Any) -> Any:
        time.sleep(SECONDS)
        if (fault := Path(os.environ.get(FAULT, os.devnull))).is_file():
            name = fault.read_text()
            fault.unlink()
            raise error_of_a_gpu(name)
        return self._kernels.merge(*arguments)


def error_of_a_gpu(name: str) -> Exception:
    """What torch raises where a GPU's memory is full ("memory"), or where its context is lost ("cuda")."""
    import torch  # as everywhere, in the child alone

    if name == "memory":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return RuntimeError("CUDA error: an illegal memory access was encountered")


@worker_process_init.connect
def slow_down(**_: Any) -> None:
    if (starting := os.environ.get(STARTING)) is not None:
        Path(starting).touch()
        time.sleep(START_SECONDS)
    doorbell = current_app.tasks[TASK]
    doorbell.place = replace(doorbell.place, kernels=SlowKernels(doorbell.place.kernels))


if __name__ == "__main__":
    run_worker(Settings.model_validate_json(sys.argv[1]), tasks="tests.worker.slow_worker")
