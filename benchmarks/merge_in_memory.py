"""TIES of four adapters over a model of 8 B parameters that lies in memory: what the kernels alone take of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.timing import timed
from worker.engine.kernels import Kernels
from worker.engine.kernels.signature import Product, Rule, Trim

SOURCES, RANK, DENSITY = 4, 16, 0.2
RULE = Rule(elect="mass", divisor="agreeing_weights")
# Llama 3 8B: (out, in) of a layer's linear modules, 32 layers; its embedding and head carry no adapter
LAYERS_8B = 32
MODULES_8B = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
SAMPLE_ROWS = 32


def lora_seconds(kernels: Kernels, device: str, *, layers: int) -> float:
    """TIES, four adapters of rank 16, over every linear module of Llama 3 8B, bfloat16, all of it in memory.

    A tensor's thresholds come from a sample of its rows, one sweep that collects what lies near, and the exact k-th of
    that; then the merge. All of it is in the time, and ends when the last result is there.
    """
    generator = torch.Generator(device=device).manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(0.02)

    bases = [torch.empty(layers, rows * columns, dtype=torch.bfloat16, device=device) for rows, columns in MODULES_8B]
    results = [torch.empty_like(base) for base in bases]
    adapters = [
        [
            [
                Product(kernels.place(noise(rows, RANK)), kernels.place(noise(RANK, columns)), 2.0)
                for _ in range(SOURCES)
            ]
            for rows, columns in MODULES_8B
        ]
        for _ in range(layers)
    ]
    for base in bases:
        base.normal_(0, 0.02, generator=generator)
    largest = max(rows * columns for rows, columns in MODULES_8B)
    found = torch.empty(SOURCES, largest // 16, dtype=torch.int32, device=device)

    def merge_all() -> None:
        for layer in range(layers):
            for module in range(len(MODULES_8B)):
                ties(kernels, bases[module][layer], adapters[layer][module], results[module][layer], found)

    return median(timed(merge_all, device))


def ties(
    kernels: Kernels, base: torch.Tensor, deltas: Sequence[Product], result: torch.Tensor, found: torch.Tensor
) -> None:
    """One tensor; k of each source stay, and whatever equals the k-th, which is rare among products."""
    k = int(DENSITY * len(base))
    brackets = [_bracket(kernels, delta) for delta in deltas]
    trims = []
    for (above, inside), row in zip(kernels.collect(deltas, brackets, found), found, strict=True):
        if not above < k <= above + inside <= above + len(row):
            raise RuntimeError("a bracket missed the threshold, or held too much; the time would be another's")
        threshold = int(row[:inside].topk(k - above).values[-1])
        trims.append(Trim(threshold=threshold - 1))  # so that the k-th stays too
    kernels.merge(base, deltas, trims, [1.0] * len(deltas), RULE, result)


def _bracket(kernels: Kernels, delta: Product) -> tuple[int, int]:
    """Magnitudes between which the threshold lies, from some rows spread over the matrix."""
    step = len(delta.left) // SAMPLE_ROWS
    sample = Product(delta.left[::step][:SAMPLE_ROWS].contiguous(), delta.right, delta.scale)
    values = torch.empty(len(sample.left) * delta.right.shape[1], device=delta.left.device)
    kernels.form(sample, values)
    ordered = values.abs().sort(descending=True).values.view(torch.int32)
    places = (int((DENSITY + 0.02) * len(values)), int((DENSITY - 0.02) * len(values)))
    low, high = (int(ordered[place]) for place in places)
    return low, high
