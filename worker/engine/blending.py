"""Merging by a method's own arithmetic: its reductions over a tensor, then block by block."""

from __future__ import annotations

from app.artifacts.manifest import TensorStatistics
from app.planning.plan import Plan, TensorPlan
from worker.engine.meter import Meter
from worker.engine.methods import BlendMethod
from worker.engine.tensors import BlockWork, blending, pass_over
from worker.engine.trimming import Pulse
from worker.engine.views import Resources


class Blending:
    """One merge by a blend method. ``work`` is asked for one tensor after the other."""

    bytes_before = 0

    def __init__(self, plan: Plan, method: BlendMethod, resources: Resources) -> None:
        self._plan, self._method, self._resources = plan, method, resources

    def begin(self, meter: Meter) -> None:
        """Nothing spans the model."""

    def work(self, tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        deltas = self._resources.deltas.open(tensor, [1.0] * len(tensor.contributions))
        passing = pass_over(self._plan, deltas, self._resources, pulse)
        return blending(self._plan, passing, self._method.prepare(passing))

    def measured(self, _tensor: TensorPlan, blocks: TensorStatistics) -> TensorStatistics:
        return blocks
