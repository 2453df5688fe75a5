"""Merging by votes: trims or masks, then the fused kernels. What spans the whole model comes first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from app.artifacts.manifest import TensorStatistics
from app.planning.output import output_bytes
from app.planning.plan import Plan, TensorPlan
from worker.engine.meter import Meter
from worker.engine.methods import VoteMethod
from worker.engine.tensors import BlockWork, masking, merging, pass_over
from worker.engine.trimming import Passes, Pulse, TensorTrims
from worker.engine.views import Resources


class Voting:
    """One merge by a vote method. ``work`` is asked for one tensor after the other."""

    def __init__(self, plan: Plan, method: VoteMethod, resources: Resources) -> None:
        self._plan, self.method, self._resources = plan, method, resources
        self._passes = Passes(method=method, resources=resources, sources=len(plan.sources))
        # what spans the whole model goes in the order of names, which decides between equal magnitudes
        touched = sorted(
            (tensor for tensor in plan.tensors if tensor.contributions and 0 not in tensor.shape),
            key=lambda tensor: tensor.name,
        )
        self._spanning = [tensor for tensor in touched if method.needs(tensor).trim == "model"]
        self._voting = [tensor for tensor in touched if method.needs(tensor).majority]
        rescaling = any(method.needs(tensor).rescale for tensor in self._spanning)
        self._trim_bytes = (5 if rescaling else 4) * sum(map(output_bytes, self._spanning))
        self.bytes_before = self._trim_bytes + sum(map(output_bytes, self._voting))
        self._trims: Mapping[str, TensorTrims] = {}
        self._zero_sign: Literal[1, -1] = 1

    def begin(self, meter: Meter) -> None:
        """Trims that span the model, and what a zero sum elects."""
        trims: dict[str, TensorTrims] = {}
        if self._spanning:
            trims.update(self._passes.select(self._spanning, meter.count))
            meter.reach(self._trim_bytes)  # a pass that was not needed
        balance = 0
        for tensor in self._voting:
            if tensor.name not in trims:
                trims[tensor.name] = self._passes.trims_of(tensor, meter.watch)
            balance += self._passes.balance(tensor, trims[tensor.name], meter.count)
        self._trims, self._zero_sign = trims, -1 if balance < 0 else 1

    def work(self, tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        deltas = self._passes.open(tensor)
        weights, rule = self.method.weights(tensor), self._passes.rule(tensor, self._zero_sign)
        if self.method.mask is not None:
            passing = pass_over(self._plan, deltas, self._resources, pulse)
            return masking(self._plan, passing, self.method.mask(passing), weights=weights, rule=rule)
        found = self._trims.get(tensor.name)
        return merging(
            self._plan,
            deltas,
            self._resources,
            trims=self._passes.trims_of(tensor, pulse) if found is None else found,
            weights=weights,
            rule=rule,
        )

    def measured(self, _tensor: TensorPlan, blocks: TensorStatistics) -> TensorStatistics:
        return blocks
