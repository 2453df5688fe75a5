"""The manifest names what calculated a merge. No GPU is needed: the kernels of one, and its name, are made up here."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from worker.engine.kernels import load
from worker.engine.kernels.cpu import CpuKernels
from worker.engine.run import versions

LIBRARIES = {"mergeyard", "python", "numba", "numpy", "torch"}


class GpuKernels(CpuKernels):
    """Kernels that say they are a GPU's."""

    name = "cuda"


def test_on_the_cpu_it_names_the_libraries() -> None:
    found = versions(load("cpu"))
    assert set(found) == LIBRARIES
    assert found["torch"] == version("torch")


def test_on_a_gpu_it_names_that_and_what_drives_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("worker.engine.run.version", lambda name: f"1.0+{name}")
    found = versions(GpuKernels())
    assert set(found) == {*LIBRARIES, "triton", "cuda", "gpu"}
    assert (found["triton"], found["cuda"], found["gpu"]) == ("1.0+triton", "12.8", "NVIDIA H100 80GB HBM3")
