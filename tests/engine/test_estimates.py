"""What a plan says a merge will hold in memory is no less than what the engine takes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from app.planning import output
from app.planning.budgets import THREADS
from app.planning.output import PROCESS_BYTES
from app.planning.plan import Plan
from tests.engine.merges import Watch, plan_of
from tests.files import write_model
from worker.engine import blocks, deltas
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.engine.run import run_merge
from worker.engine.sinks import FolderSink

SHAPE = (600, 500)
METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "model_stock": {},
    "linear": {"weight": 0.5},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor has more of them than there are threads."""
    for module in (blocks, output):
        monkeypatch.setattr(module, "BLOCK_VALUES", 1 << 14)


class Counting:
    """Kernels that add up the memory that blocks and their results are given; it stays theirs for the whole merge."""

    def __init__(self) -> None:
        self._kernels, self._lock, self.taken = load("cpu"), threading.Lock(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def memory(self, size: int) -> torch.Tensor:
        with self._lock:
            self.taken += size
        return self._kernels.memory(size)


def planned(root: Path, method: str, dtype: torch.dtype) -> Plan:
    for seed, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(SHAPE, generator=generator).to(dtype)
            for layer in range(2)
        }
        write_model(root / f"{name}-{dtype}".replace("torch.", ""), tensors)
    kind = str(dtype).removeprefix("torch.")
    models = [{"model": f"{name}-{kind}", "parameters": METHODS[method]} for name in ("one", "two")]
    recipe = {"base_model": f"base-{kind}", "merge_method": method, "models": models, "out_dtype": "float32"}
    return plan_of(root, recipe)


def merged(plan: Plan, out: Path) -> Counting:
    kernels = Counting()
    with FolderSink(out) as sink:
        run_merge(
            plan,
            sink,
            kernels=kernels,  # type: ignore[arg-type]
            threads=THREADS,
            control=Watch(),
            digests=DigestCache(None),
        )
    return kernels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_and_waiting_results_take_no_more_than_planned(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    plan = planned(tmp_path, method, dtype)
    assert 0 < merged(plan, tmp_path / "out").taken <= plan.estimates.peak_memory_bytes - PROCESS_BYTES


def test_task_vectors_of_float64_models_are_formed_and_kept_and_that_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, int] = {}
    real = deltas._Buffer.of

    def of(buffer: deltas._Buffer, values: int) -> torch.Tensor:
        found = real(buffer, values)
        kept[id(buffer)] = found.nbytes
        return found

    monkeypatch.setattr(deltas._Buffer, "of", of)
    narrow, wide = (planned(tmp_path, "ties", dtype) for dtype in (torch.float32, torch.float64))
    merged(narrow, tmp_path / "narrow")
    assert kept == {}, "the kernels form differences of these on the way"
    merged(wide, tmp_path / "wide")
    planned_for_them = wide.estimates.peak_memory_bytes - narrow.estimates.peak_memory_bytes
    assert 2 * 2 * 4 * SHAPE[0] * SHAPE[1] <= sum(kept.values()) <= planned_for_them
