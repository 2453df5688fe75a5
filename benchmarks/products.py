"""The bare products of the floor: every B·A of every adapter by ``torch.mm``, in float32, and nothing else.

``python -m benchmarks.products fresh|reused JOB``: each into memory of its own, as ``torch.mm(B, A)`` gives it, or all
into one buffer whose pages are there already. No result is kept; the factors are in memory before the clock starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.clock import Clock
from benchmarks.job import read_job


def main() -> None:
    way, job = sys.argv[1], read_job(sys.argv[2])
    pairs = [pair for adapter in job.adapters for pair in factors(Path(adapter))]
    if way == "reused":
        buffer = torch.empty(max(len(B) * A.shape[1] for B, A in pairs)).zero_()
        clock = Clock()
        reused(pairs, buffer)
    else:
        clock = Clock()
        fresh(pairs)
    clock.report()


def factors(adapter: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(B, A) of every module, in float32."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [
        (tensors[name.replace("lora_A", "lora_B")].float(), A.float())
        for name, A in tensors.items()
        if "lora_A" in name
    ]


def fresh(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for B, A in pairs:
        torch.mm(B, A)


def reused(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], buffer: torch.Tensor) -> None:
    for B, A in pairs:
        torch.mm(B, A, out=buffer[: len(B) * A.shape[1]].view(len(B), A.shape[1]))


if __name__ == "__main__":
    main()
