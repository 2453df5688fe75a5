"""The stream: weights in, weights out, in one pass over the output.

Shard by shard and tensor by tensor; blocks run side by side, results come out in order and go to the writer's thread,
so reading, arithmetic, hashing and writing overlap. Before it, where the method reduces over the whole model, come as
many passes over Δ as that takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import torch

from app.artifacts.manifest import StoredFile, TensorStatistics
from app.planning.plan import Plan, ShardPlan, TensorPlan
from worker.engine.blocks import Block, Crew, cut
from worker.engine.checkpoint import Buffers, ShardWriter, header_of, tensor_bytes
from worker.engine.deltas import Deltas, ScratchPool
from worker.engine.digests import SourceDigests
from worker.engine.kernels.signature import BlockStatistics, Kernels
from worker.engine.methods import method_of
from worker.engine.reader import Reader, dtype_of
from worker.engine.sinks import Sink
from worker.engine.tensors import BlockWork, StatisticsSum, copying, merging
from worker.engine.trimming import Passes, TensorTrims

_SPARE_BUFFERS = 4  # results that wait for the writer while the next blocks are worked on


class Control(Protocol):
    """How a merge is watched and stopped. All calls come from the thread that runs the merge."""

    def stage(self, name: str) -> None:
        """``merging`` once the plan is taken up, ``publishing`` once every weight is written."""
        ...

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """After every block, so it should be cheap.

        ``bytes_total`` is the bytes of the output's tensors, and once more the bytes of those that a pass over the
        whole model reads; it never changes during a merge, and ``bytes_done`` never falls.
        """
        ...

    def check(self) -> None:
        """Called after every block, and every so often while files are hashed.

        Whatever it raises stops the merge and leaves nothing behind.
        """
        ...


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
        control: Control,
        hashing: SourceDigests,
        delta_budget: int,
    ) -> None:
        self._plan, self._sink, self._kernels, self._crew, self._reader = plan, sink, kernels, crew, reader
        self._method = method_of(plan.method)
        self._scratches = ScratchPool()
        self._passes = Passes(
            method=self._method,
            kernels=kernels,
            deltas=Deltas([source.reference for source in plan.sources], reader, delta_budget),
            crew=crew,
            scratches=self._scratches,
            sources=len(plan.sources),
        )
        # what spans the whole model goes in the order of names, which decides between equal magnitudes
        touched = sorted((tensor for tensor in plan.tensors if tensor.contributions), key=lambda tensor: tensor.name)
        self._spanning = [tensor for tensor in touched if self._method.needs(tensor).trim == "model"]
        self._voting = [tensor for tensor in touched if self._method.needs(tensor).majority]
        rescaling = any(self._method.needs(tensor).rescale for tensor in self._spanning)
        self._trim_bytes = (4 if rescaling else 3) * sum(map(tensor_bytes, self._spanning))
        total = self._trim_bytes + sum(map(tensor_bytes, self._voting)) + sum(map(tensor_bytes, plan.tensors))
        self._meter = _Meter(control, hashing, total)

    def run(self) -> tuple[list[StoredFile], dict[str, TensorStatistics]]:
        """Writes or adopts every weight file. The files and the changed tensors' statistics, in the plan's order."""
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
        trims, zero_sign = self._whole_model()
        adopted_bytes = sum(map(tensor_bytes, self._plan.tensors))
        adopted_bytes -= sum(tensor_bytes(tensor) for shard in shards for tensor in shard.tensors)
        self._meter.advance(adopted_bytes)
        buffers = Buffers(self._crew.ahead + _SPARE_BUFFERS, _largest_block(shards))
        with ShardWriter(self._sink, buffers) as writer:
            for shard in shards:
                header = header_of(shard, self._plan.metadata)
                size = len(header) + sum(map(tensor_bytes, shard.tensors))
                writer.begin(shard.filename, header, size)
                found = {}
                for tensor in shard.tensors:
                    work = self._work(tensor, trims, zero_sign)
                    entry = self._write_tensor(tensor, work, buffers, writer)
                    if tensor.contributions:
                        found[tensor.name] = entry
                writer.finish(shard.filename, found)
                statistics.update(found)
            return {stored.name: stored for stored in writer.finish_all()}

    def _whole_model(self) -> tuple[dict[str, TensorTrims], Literal[1, -1]]:
        """Trims found so far, by tensor, and what a zero sum elects."""
        trims: dict[str, TensorTrims] = {}
        if self._spanning:
            trims.update(self._passes.select(self._spanning, self._meter.count))
            self._meter.reach(self._trim_bytes)  # a pass that was not needed
        balance = 0
        for tensor in self._voting:
            if tensor.name not in trims:
                trims[tensor.name] = self._passes.trims_of(tensor, self._meter.watch)
            balance += self._passes.balance(tensor, trims[tensor.name], self._meter.count)
        return trims, -1 if balance < 0 else 1

    def _work(self, tensor: TensorPlan, trims: Mapping[str, TensorTrims], zero_sign: Literal[1, -1]) -> BlockWork:
        if not tensor.contributions:
            return copying(self._plan, tensor, self._reader)
        found = trims.get(tensor.name)
        return merging(
            self._plan,
            tensor,
            self._reader,
            kernels=self._kernels,
            deltas=self._passes.open(tensor),
            trims=self._passes.trims_of(tensor, self._meter.watch) if found is None else found,
            weights=self._method.weights(tensor),
            rule=self._passes.rule(tensor, zero_sign),
        )

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
        return total.result()


class _Meter:
    """Counts the bytes done, and gives the caller and the hashing thread their say after every block."""

    def __init__(self, control: Control, hashing: SourceDigests, total: int) -> None:
        self._control, self._hashing, self._total = control, hashing, total
        self._done = 0

    def count(self, tensor: TensorPlan, block: Block) -> None:
        self.advance(block.size * dtype_of(tensor.dtype, tensor.name).itemsize)

    def watch(self, _tensor: TensorPlan, _block: Block) -> None:
        """A block of a pass within one tensor, whose bytes count when they are written."""
        self.check()

    def check(self) -> None:
        self._hashing.check()
        self._control.check()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self.check()
        self._control.progress(self._done, self._total)

    def complete(self) -> None:
        self.reach(self._total)

    def reach(self, nbytes: int) -> None:
        self.advance(max(0, nbytes - self._done))


def _largest_block(shards: list[ShardPlan]) -> int:
    """Bytes of the largest block of output."""
    sizes = (
        cut(tensor.shape)[0].size * dtype_of(tensor.dtype, tensor.name).itemsize
        for shard in shards
        for tensor in shard.tensors
        if math.prod(tensor.shape)
    )
    return max(sizes, default=0)
