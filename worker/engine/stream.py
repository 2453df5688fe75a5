"""The stream: weights in, weights out, in one pass over the output.

Shard by shard and tensor by tensor; blocks run side by side, results come out in order and go to the writer's thread,
so reading, arithmetic, hashing and writing overlap; the next tensor is opened meanwhile. Before it, where the method
reduces over the whole model, come as many passes over Δ as that takes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch

from app.artifacts.manifest import StoredFile, TensorStatistics
from app.planning.budgets import SPARE_RESULTS
from app.planning.output import output_bytes
from app.planning.plan import Plan, ShardPlan, TensorPlan
from worker.engine.adapter_output import AdapterWriting
from worker.engine.blending import Blending
from worker.engine.blocks import Block, Crew, cut
from worker.engine.checkpoint import Buffers, ShardWriter
from worker.engine.deltas import Deltas, ScratchPool
from worker.engine.factoring import Factoring
from worker.engine.kernels.signature import BlockStatistics, Kernels
from worker.engine.meter import Meter
from worker.engine.methods import FactorMethod, VoteMethod, method_of
from worker.engine.opening import opened_ahead
from worker.engine.reader import Reader, dtype_of
from worker.engine.sinks import Sink
from worker.engine.tensors import BlockWork, StatisticsSum, copying
from worker.engine.trimming import Pulse
from worker.engine.views import Resources
from worker.engine.voting import Voting

_LEAST_BUFFER = 1 << 16


class Stream:
    """One merge's weights. Use once."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        kernels: Kernels,
        crew: Crew,
        reader: Reader,
        delta_budget: int,
    ) -> None:
        self._plan, self._sink, self._crew, self._reader = plan, sink, crew, reader
        self._scratches = ScratchPool(kernels.memory)
        deltas = Deltas([source.reference for source in plan.sources], reader, kernels, delta_budget)
        self._resources = resources = Resources(
            kernels=kernels, crew=crew, reader=reader, scratches=self._scratches, deltas=deltas
        )
        self._way = _way_of(plan, resources)
        self.total = self._way.bytes_before + sum(map(output_bytes, plan.tensors))

    def run(self, meter: Meter) -> tuple[list[StoredFile], dict[str, TensorStatistics]]:
        """Writes or adopts every weight file. The files and the changed tensors' statistics, in the plan's order.

        ``meter`` counts ``total`` bytes.
        """
        self._meter = meter
        adopted: dict[str, StoredFile] = {}
        statistics: dict[str, TensorStatistics] = {}
        for shard in self._plan.shards:
            stored = self._sink.adopt(shard.filename, self._meter.check)
            remembered = None if stored is None else self._sink.recall(shard.filename)
            if stored is not None and remembered is not None:
                adopted[shard.filename] = stored
                statistics.update(remembered)
        waiting = [shard for shard in self._plan.shards if shard.filename not in adopted]
        written = self._write(waiting, statistics) if waiting else {}
        self._meter.complete()
        stored_files = [{**adopted, **written}[shard.filename] for shard in self._plan.shards]
        ordered = {tensor.name: statistics[tensor.name] for tensor in self._plan.tensors if tensor.contributions}
        return stored_files, ordered

    def _write(self, shards: list[ShardPlan], statistics: dict[str, TensorStatistics]) -> dict[str, StoredFile]:
        """The shards that no earlier attempt finished, by file name; ``statistics`` gains those of their tensors."""
        self._way.begin(self._meter)
        adopted_bytes = sum(map(output_bytes, self._plan.tensors))
        adopted_bytes -= sum(output_bytes(tensor) for shard in shards for tensor in shard.tensors)
        self._meter.advance(adopted_bytes)
        size = max(_largest_block(shards), _LEAST_BUFFER)
        buffers = Buffers(self._crew.ahead + SPARE_RESULTS, size, self._resources.kernels.memory)
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        with (
            ShardWriter(self._sink, buffers) as writer,
            contextlib.closing(opened_ahead(tensors, self._work, self._meter.check)) as opened,
        ):
            for shard in shards:
                found = self._write_shard(shard, buffers, writer, opened)
                writer.finish(shard.filename, found)
                statistics.update(found)
            return {stored.name: stored for stored in writer.finish_all()}

    def _write_shard(
        self,
        shard: ShardPlan,
        buffers: Buffers,
        writer: ShardWriter,
        opened: Iterator[tuple[TensorPlan, BlockWork]],
    ) -> dict[str, TensorStatistics]:
        """Begins and fills one file; the statistics of the tensors in it that change.

        ``opened`` gives the tensors of all files one after the other.
        """
        if self._plan.adapter is not None:
            writing = AdapterWriting(
                self._plan, self._plan.adapter, self._resources, self._work, self._way, self._meter
            )
            return writing.write(shard, writer, buffers)
        header = shard.header(self._plan.metadata)
        size = len(header) + sum(map(output_bytes, shard.tensors))
        writer.begin(shard.filename, header, size)
        found = {}
        for tensor, work in islice(opened, len(shard.tensors)):
            entry = self._write_tensor(tensor, work, buffers, writer)
            if tensor.contributions:
                found[tensor.name] = entry
        return found

    def _work(self, tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        if not tensor.contributions or 0 in tensor.shape:
            return copying(self._plan, tensor, self._reader)
        return self._way.work(tensor, pulse)

    def _write_tensor(
        self, tensor: TensorPlan, work: BlockWork, buffers: Buffers, writer: ShardWriter
    ) -> TensorStatistics:
        itemsize = dtype_of(tensor.dtype, tensor.name).itemsize
        total = StatisticsSum(tensor)

        def of_block(item: tuple[Block, torch.Tensor]) -> tuple[Block, torch.Tensor, BlockStatistics | None]:
            block, buffer = item
            with self._scratches.borrow() as scratch:
                return block, buffer, work(block, buffer, scratch)

        items: Iterator[tuple[Block, torch.Tensor]] = ((block, buffers.take()) for block in cut(tensor.shape))
        for block, buffer, found in self._crew.in_order(of_block, items):
            writer.write(buffer, block.size * itemsize)
            if found is not None:
                total.add(found)
            self._meter.count(tensor, block)
        return self._way.measured(tensor, total.result())


class _Way(Protocol):
    """How one shape of method merges. ``bytes_before``: what its passes over the whole model count."""

    bytes_before: int

    def begin(self, meter: Meter) -> None:
        """The passes over the whole model."""
        ...

    def work(self, tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        """The passes over one tensor, and then what merges its blocks."""
        ...

    def measured(self, tensor: TensorPlan, blocks: TensorStatistics) -> TensorStatistics:
        """A tensor's statistics, once its blocks are merged."""
        ...


def _way_of(plan: Plan, resources: Resources) -> _Way:
    match method_of(plan.method):
        case VoteMethod() as method:
            return Voting(plan, method, resources)
        case FactorMethod() as method:
            return Factoring(plan, method, resources)
        case method:
            return Blending(plan, method, resources)


def _largest_block(shards: list[ShardPlan]) -> int:
    """Bytes of the largest block of output."""
    sizes = (
        cut(tensor.shape)[0].size * dtype_of(tensor.dtype, tensor.name).itemsize
        for shard in shards
        for tensor in shard.tensors
        if math.prod(tensor.shape)
    )
    return max(sizes, default=0)
