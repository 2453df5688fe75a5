"""The GPU's kernels through Triton's compiler, which needs no GPU: what the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VALUES = 16  # of a tile in each thread: 4 warps, 2048 values


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each kernel, by its name and the GPU's architecture."""
    cache = tmp_path_factory.mktemp("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.compiled_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles(compiled: dict[str, Any]) -> None:
    assert len(compiled) == 24
    assert all(kernel["binary"] for kernel in compiled.values())


def test_no_product_is_contracted_with_its_sum(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled.items():
        # The assembler must not do it either. What stands there are the statistics' squares: of the sources, each in
        # the one loop or in as many as are held, and of the change.
        sums = 0
        if name.startswith("merge"):
            sums = 2 if "many" in name else 5
        assert kernel["fusion"] is False
        assert kernel["contracted"] == sums * VALUES, name


def test_denormals_are_not_flushed(compiled: dict[str, Any]) -> None:
    assert not any(kernel["flushed"] for kernel in compiled.values())
