"""Merging by factors: the adapters' low-rank matrices give new ones, which are applied block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from app.artifacts.manifest import TensorStatistics
from app.planning.low_rank import is_low_rank
from app.planning.plan import Contribution, LoraFactors, Plan, TensorPlan
from app.sources.source import TensorSpec
from worker.engine.blocks import Block, cut
from worker.engine.deltas import SAMPLE_GROUPS, Deltas, OpenSource, Scratch, TensorDeltas, not_finite
from worker.engine.factors import Factors, all_finite
from worker.engine.kernels.signature import BlockStatistics, Rule
from worker.engine.low_rank import LowRank
from worker.engine.meter import Meter
from worker.engine.methods import FactorMethod, VoteMethod
from worker.engine.methods.method import FactorMerge, MatrixMerge
from worker.engine.reader import Reader
from worker.engine.tensors import BlockWork, StatisticsSum, merging, overflow
from worker.engine.trimming import Passes, Pulse, trims_at
from worker.engine.views import Resources
from worker.engine.voting import Voting

_SAMPLE_VALUES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Factored:
    """A tensor's merged ΔW by its factors, (out, in); ``transposed`` where the base stores it as (in, out)."""

    matrix: LowRank
    transposed: bool
    statistics: TensorStatistics


class Factoring:
    """One merge by a factor method. ``work`` is asked for one tensor after the other."""

    bytes_before = 0

    def __init__(self, plan: Plan, method: FactorMethod, resources: Resources) -> None:
        self._plan, self._method, self._resources = plan, method, resources
        self._dense: dict[str, Voting] = {}
        self._found: dict[str, TensorStatistics] = {}

    def begin(self, meter: Meter) -> None:
        """Nothing spans the model."""

    def work(self, tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        factored = self.factored(tensor, pulse)
        if factored is None:
            method = self._method.dense(tensor)
            if method.name not in self._dense:
                self._dense[method.name] = Voting(self._plan, method, self._resources)
            return self._dense[method.name].work(tensor, pulse)
        self._found[tensor.name] = factored.statistics
        product = _product(tensor, factored, self._resources)
        merge = merging(self._plan, product, self._resources, trims=[None], weights=[1.0], rule=Rule())
        silent = len(tensor.contributions)

        def of_block(block: Block, buffer: torch.Tensor, scratch: Scratch) -> BlockStatistics:
            found = merge(block, buffer, scratch)
            assert found is not None
            return replace(found, kept=(0,) * silent, squares=(0.0,) * silent)

        return of_block

    def factored(self, tensor: TensorPlan, pulse: Pulse) -> Factored | None:
        """The tensor merged by its factors; None where it is not low-rank.

        Raises ``source_not_finite``, and ``result_not_finite`` where float32 cannot hold what is merged.
        """
        if not is_low_rank(tensor):
            return None
        sources, transposed = read_factors(self._plan, tensor, self._resources.reader)
        dense = self._method.dense(tensor)

        def merge(matrices: Sequence[torch.Tensor]) -> MatrixMerge:
            return _merge_matrices(tensor, matrices, dense, self._resources, len(self._plan.sources), pulse)

        merged = self._method.merge(tensor, sources, merge)
        return Factored(
            matrix=merged.matrix,
            transposed=transposed,
            statistics=statistics_of(tensor, sources, merged),
        )

    def measured(self, tensor: TensorPlan, blocks: TensorStatistics) -> TensorStatistics:
        """What is known of a tensor after its blocks are merged: of the sources from their factors."""
        found = self._found.pop(tensor.name, None)
        return blocks if found is None else replace(found, merged_norm=blocks.merged_norm)


def read_factors(plan: Plan, tensor: TensorPlan, reader: Reader) -> tuple[list[LowRank], bool]:
    """Each contribution's Δ as (out, in), its scale in the left factor, of rank 0 where it changes nothing.

    And whether the base stores the matrix as (in, out). Raises ``source_not_finite``.
    """
    transposed = next(item.lora.transposed for item in tensor.contributions if item.lora is not None)
    rows, columns = tensor.shape[::-1] if transposed else tensor.shape
    found = []
    for item in tensor.contributions:
        if item.lora is None:
            nothing = torch.empty(0, dtype=torch.float64)
            found.append(LowRank(nothing.new_empty(rows, 0), nothing.new_empty(0, columns)))
        else:
            found.append(_read(plan, item, item.lora, reader))
    return found, transposed


def statistics_of(tensor: TensorPlan, sources: Sequence[LowRank], merged: FactorMerge) -> TensorStatistics:
    """What factors tell; where no values were compared the sign conflict is unknown."""
    return TensorStatistics(
        sources=tuple(item.source for item in tensor.contributions),
        trimmed=merged.trimmed or (0.0,) * len(sources),
        sign_conflict=merged.sign_conflict,
        source_norms=tuple(math.sqrt(source.square) for source in sources),
        merged_norm=math.sqrt(merged.matrix.square),
        parameters=math.prod(tensor.shape),
    )


def _read(plan: Plan, item: Contribution, lora: LoraFactors, reader: Reader) -> LowRank:
    def whole(spec: TensorSpec) -> torch.Tensor:
        values = reader.whole(spec)
        if not all_finite(values):
            raise not_finite(plan.sources[item.source].reference, spec.name)
        return values.double()

    return LowRank(whole(lora.B) * lora.scale, whole(lora.A))


def _merge_matrices(
    tensor: TensorPlan,
    matrices: Sequence[torch.Tensor],
    method: VoteMethod,
    resources: Resources,
    sources: int,
    pulse: Pulse,
) -> MatrixMerge:
    """Small matrices through the passes and kernels that merge whole tensors, in float32 as those."""
    core = replace(tensor, shape=tuple(matrices[0].shape))
    values = torch.stack([matrix.flatten() for matrix in matrices]).float()
    if not all_finite(values):
        raise overflow(tensor)
    held = replace(resources, deltas=_HeldDeltas(values, resources))
    passes = Passes(method=method, resources=held, sources=sources)
    deltas, trims = passes.open(core), passes.trims_of(core, pulse)
    weights, rule = method.weights(core), passes.rule(core)
    out, total = torch.empty(values.shape[1]), StatisticsSum(core)
    scratch = Scratch(resources.kernels.memory)
    for block in cut(core.shape):
        place = slice(block.start, block.stop)
        base = torch.zeros(block.size)
        found = resources.kernels.merge(
            base, deltas.operands(block, scratch), trims_at(trims, block), weights, rule, out[place]
        )
        if not found.finite:
            raise overflow(tensor)
        total.add(found)
    known = total.result()
    return MatrixMerge(out.view(core.shape).double(), known.trimmed, known.sign_conflict or 0.0)


class _HeldDeltas(Deltas):
    """Task vectors that lie in memory already."""

    def __init__(self, values: torch.Tensor, resources: Resources) -> None:
        super().__init__((), resources.reader, resources.kernels, budget=0)
        self._values, self._resources = values, resources

    def open(self, tensor: TensorPlan, prescale: Sequence[float]) -> TensorDeltas:
        return _Held(tensor, self._values * torch.tensor(prescale)[:, None], self._resources)


class _Held(TensorDeltas):
    def __init__(self, tensor: TensorPlan, values: torch.Tensor, resources: Resources) -> None:
        super().__init__(tensor, [OpenSource(added=own) for own in values], resources.reader, resources.kernels)
        self._values = values

    def sample(self, index: int, columns: int, scratch: Scratch) -> torch.Tensor:  # noqa: ARG002
        """Every so many-th value, shared out to the groups in turn."""
        values = self._values[index]
        taken = values[:: max(1, len(values) // _SAMPLE_VALUES)]
        return taken[: len(taken) // SAMPLE_GROUPS * SAMPLE_GROUPS].reshape(-1, SAMPLE_GROUPS).T.contiguous()


def _product(tensor: TensorPlan, factored: Factored, resources: Resources) -> TensorDeltas:
    """The merged ΔW as the only task vector of its tensor."""
    left, right = factored.matrix.left, factored.matrix.right
    if factored.transposed:
        left, right = right.T, left.T
    factors = Factors(left=left.float()[None], right=right.float()[None], scale=1.0)
    return TensorDeltas(tensor, [OpenSource(lora=factors)], resources.reader, resources.kernels)
