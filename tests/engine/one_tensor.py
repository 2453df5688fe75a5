"""Merges one tensor with a method and a room of kernels, cut into blocks: select → trim → merge, as the engine does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from app.planning.plan import Contribution, Scalar, TensorPlan
from app.sources.source import SourceFile, TensorSpec
from worker.engine.kernels.selection import coarse_bin, fine_threshold
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS, KEEP_ALL, KEEP_NONE, BlockStatistics, Kernels, Trim
from worker.engine.methods import VoteMethod, method_of

# The table of merging-maths.md, in the single choices of app/planning/plan.py.
MERGEKIT: dict[str, Scalar] = {
    "lambda": 1.0,
    "normalize": True,
    "rescale": False,
    "trim_scope": "tensor",
    "min_keep": 1,
    "elect": "mass",
    "quorum": 0.0,
    "weights": "vote",
    "divisor": "agreeing_weights",
    "zero_sum": "plus",
}
PEFT = MERGEKIT | {"min_keep": 0, "weights": "merge", "divisor": "agreeing"}
PAPER = PEFT | {"trim_scope": "model", "weights": "scale", "zero_sum": "majority"}
ARTICLE = PEFT | {"elect": "unanimous", "weights": "scale", "divisor": "sources"}


@dataclass(frozen=True, kw_only=True)
class Merged:
    values: torch.Tensor
    blocks: tuple[BlockStatistics, ...]
    kept: tuple[int, ...]  # over all blocks, one for each source


def plan_of(
    n: int, parameters: Mapping[str, Scalar], weights: Sequence[float], densities: Sequence[float] | float = 1.0
) -> TensorPlan:
    """A tensor of n values that every one of the weighted sources changes."""
    if isinstance(densities, float):
        densities = [densities] * len(weights)
    file = SourceFile(name="base", path=Path("base"), size=4 * n, mtime_ns=0, header_sha256="")
    spec = TensorSpec(name="w", dtype="F32", shape=(n,), file=file, offset=0, nbytes=4 * n)
    contributions = tuple(
        Contribution(source=i, full=spec, lora=None, parameters={"weight": weight, "density": density})
        for i, (weight, density) in enumerate(zip(weights, densities, strict=True))
    )
    return TensorPlan(name="w", shape=(n,), dtype="F32", base=spec, contributions=contributions, parameters=parameters)


def merge_one_tensor(
    kernels: Kernels,
    method_name: str,
    tensor: TensorPlan,
    deltas: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    sources: int | None = None,
    block: int | None = None,
) -> Merged:
    """The tensor is the whole model here. ``block`` values a block; ``sources``: of the recipe, if more than merge."""
    method = method_of(method_name)
    assert isinstance(method, VoteMethod)
    needs = method.needs(tensor)
    if needs.prescale:
        own = torch.tensor([contribution.parameters["weight"] for contribution in tensor.contributions])
        deltas = deltas * own[:, None]
    base = torch.zeros(deltas.shape[1]) if base is None else base
    blocks = [slice(at, at + (block or len(base))) for at in range(0, len(base), block or len(base))]

    if needs.trim == "none":
        trims = [[KEEP_ALL] * len(deltas) for _ in blocks]
    else:
        by_source = [
            trims_of(kernels, delta, method.keep_count(tensor, contribution, len(delta)), blocks)
            for contribution, delta in zip(tensor.contributions, deltas, strict=True)
        ]
        if needs.rescale:
            by_source = [
                rescaled(kernels, delta, own_trims, blocks) for delta, own_trims in zip(deltas, by_source, strict=True)
            ]
        trims = [list(of_block) for of_block in zip(*by_source, strict=True)]

    weights = method.weights(tensor)
    rule = method.rule(tensor, sources=sources or len(deltas))
    if needs.majority:
        balance = sum(
            kernels.elected_balance(list(deltas[:, at]), of_block, weights, rule)
            for at, of_block in zip(blocks, trims, strict=True)
        )
        rule = method.rule(tensor, -1 if balance < 0 else 1, sources=sources or len(deltas))

    out = torch.empty_like(base)
    statistics = tuple(
        kernels.merge(base[at], list(deltas[:, at]), of_block, weights, rule, out[at])
        for at, of_block in zip(blocks, trims, strict=True)
    )
    kept = tuple(sum(counts) for counts in zip(*(block.kept for block in statistics), strict=True))
    return Merged(values=out, blocks=statistics, kept=kept)


def trims_of(kernels: Kernels, delta: torch.Tensor, k: int, blocks: Sequence[slice]) -> list[Trim]:
    """Keep exactly the k largest over all blocks; among equals the lowest flat index wins."""
    if k == 0:
        return [KEEP_NONE for _ in blocks]
    coarse = torch.zeros(COARSE_BINS, dtype=torch.int64)
    for at in blocks:
        kernels.histogram(delta[at], coarse, None)
    prefix, k_left = coarse_bin(coarse, k)
    fine = torch.zeros(FINE_BINS, dtype=torch.int64)
    for at in blocks:
        kernels.histogram(delta[at], fine, prefix)
    threshold, left, present = fine_threshold(fine, prefix, k_left)

    trims = []
    for at in blocks:
        here = kernels.count_equal(delta[at], threshold)
        trims.append(Trim(threshold=threshold, equals=min(here, left)))
        left -= trims[-1].equals
        present -= here
    assert left == 0
    assert present == 0
    return trims


def rescaled(kernels: Kernels, delta: torch.Tensor, trims: Sequence[Trim], blocks: Sequence[slice]) -> list[Trim]:
    before = sum(kernels.kept_l1(delta[at], KEEP_ALL) for at in blocks)
    after = sum(kernels.kept_l1(delta[at], trim) for at, trim in zip(blocks, trims, strict=True))
    return [replace(trim, rescale=before / after if after else 1.0) for trim in trims]
