"""The GPUs that this machine's workers can use, found without importing torch here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping

from mergeyard.processes import StartError

SECONDS = 120.0  # importing torch from a cold disk takes some
COUNT = """
import torch
from worker.engine.kernels import load
print(torch.cuda.device_count() if load("auto").name == "cuda" else 0)
"""


def usable_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that the engine would merge on; none: it merges on the CPU.

    Another process with ``environment`` looks, so that neither torch nor a CUDA context stays in this one. Where no
    driver is installed nothing is started. Raises StartError where the answer does not come.
    """
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return ()
    try:
        asked = subprocess.run(  # noqa: S603 (our own command)
            [sys.executable, "-c", COUNT],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise StartError(
            f"torch did not count the GPUs in {SECONDS:g} s; see that nvidia-smi answers, or set MERGEYARD_DEVICE=cpu."
        ) from None
    except subprocess.CalledProcessError as error:
        raise StartError(
            f"the GPUs cannot be counted; set MERGEYARD_DEVICE=cpu or mend this:\n{error.stderr}"
        ) from None
    count = int(asked.stdout)
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple((named or list(map(str, range(count))))[:count])
