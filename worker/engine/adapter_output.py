"""Writing a merge as a LoRA adapter: factors of one rank for every linear layer, what they hold measured.

Sums of low-rank task vectors are concatenated, the methods of factors give theirs, and every other merge is compressed
from its blocks. Nothing is written unless all of it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from app.artifacts.manifest import TensorStatistics
from app.errors import MergeyardError
from app.planning.adapter_output import CONFIG_NAME, cannot_hold
from app.planning.low_rank import is_low_rank
from app.planning.plan import AdapterPlan, Plan, ShardPlan, TensorPlan
from app.sources.safetensors import Entry, header
from worker.engine.blocks import Block, cut
from worker.engine.checkpoint import Buffers, ShardWriter
from worker.engine.compression import Compressed, compress_blocks, compress_factors
from worker.engine.deltas import Scratch
from worker.engine.factoring import Factored, Factoring, read_factors, statistics_of
from worker.engine.factors import all_finite
from worker.engine.kernels.signature import SMALLEST_DIVISOR, BlockStatistics
from worker.engine.low_rank import LowRank
from worker.engine.meter import Meter
from worker.engine.methods.method import FactorMerge
from worker.engine.reader import dtype_of
from worker.engine.tensors import BlockWork, StatisticsSum, overflow
from worker.engine.trimming import Pulse
from worker.engine.views import Resources
from worker.engine.voting import Voting

SHOWN = 5


class AdapterWriting:
    """The one weight file of an adapter."""

    def __init__(
        self,
        plan: Plan,
        adapter: AdapterPlan,
        resources: Resources,
        work: Callable[[TensorPlan, Pulse], BlockWork],
        way: object,
        meter: Meter,
    ) -> None:
        """``work`` opens a tensor's merge, as for a checkpoint; ``way`` is what makes it, where factors can be had."""
        self._plan, self._adapter, self._resources = plan, adapter, resources
        self._work, self._way, self._meter = work, way, meter

    def write(self, shard: ShardPlan, writer: ShardWriter, buffers: Buffers) -> dict[str, TensorStatistics]:
        """Begin and fill the file, through ``buffers``; the caller ends it.

        Raises ``lora_cannot_hold`` and ``energy_too_low``, with the tensors.
        """
        places = self._adapter.places
        held = [tensor for tensor in shard.tensors if places[tensor.name].factors]
        found = {t.name: self._measure(t) for t in shard.tensors if not places[t.name].factors}
        saved = self._saved(shard, found)
        entries = [entry for tensor in held for entry in self._factor_entries(tensor)]
        entries += [
            Entry(key, tensor.dtype, tensor.shape) for tensor in saved for key in self._saved_keys(tensor, held)
        ]
        head = header(entries, self._plan.metadata)
        writer.begin(shard.filename, head, len(head) + sum(entry.nbytes for entry in entries))
        for tensor in held:
            compressed, statistics = self._compress(tensor)
            A, B = (self._cast(tensor, values) for values in (compressed.matrix.right, compressed.matrix.left))
            energy = compressed.held_by(LowRank(B.double(), A.double()))
            found[tensor.name] = replace(statistics, retained_energy=energy)
            rank = self._adapter.rank
            for values in (_padded(A, rank, 0), _padded(B, rank, 1)):
                _write(values, writer, buffers)
        for tensor in saved:
            for _ in self._saved_keys(tensor, held):
                self._copy(tensor, writer, buffers)
        self._check_energy(held, found)
        return found

    def _saved(self, shard: ShardPlan, found: Mapping[str, TensorStatistics]) -> list[TensorPlan]:
        """The tensors that go into the file whole. Notes in ``found`` what is held of each that changed."""
        changed = [tensor for tensor in shard.tensors if tensor.name in found and found[tensor.name].merged_norm > 0]
        if changed and self._adapter.other == "refuse":
            raise MergeyardError.of([cannot_hold([tensor.name for tensor in changed])])
        return changed if self._adapter.other == "save" else []

    def _factor_entries(self, tensor: TensorPlan) -> Iterator[Entry]:
        place, rank = self._adapter.places[tensor.name], self._adapter.rank
        rows, columns = tensor.shape[::-1] if place.transposed else tensor.shape
        yield Entry(f"base_model.model.{place.module}.lora_A.weight", tensor.dtype, (rank, columns))
        yield Entry(f"base_model.model.{place.module}.lora_B.weight", tensor.dtype, (rows, rank))

    def _saved_keys(self, tensor: TensorPlan, held: Iterable[TensorPlan]) -> list[str]:
        """As PEFT names it; a bias beside factors is the layer's own (``bias: lora_only``)."""
        place = self._adapter.places[tensor.name]
        beside = any(self._adapter.places[other.name].module == place.module for other in held)
        inner = "base_layer." if beside else ""
        keys = [f"base_model.model.{place.module}.{inner}{place.parameter}"]
        return keys + ([f"base_model.model.{place.tied}.{place.parameter}"] if place.tied else [])

    # ── one tensor ──────────────────────────────────────────────────────────────────────────────

    def _compress(self, tensor: TensorPlan) -> tuple[Compressed, TensorStatistics]:
        """(out, in) at the adapter's rank, and the tensor's statistics."""
        factored = self._factored(tensor)
        rank, transposed = self._adapter.rank, self._adapter.places[tensor.name].transposed
        if factored is not None:
            self._meter.advance(math.prod(tensor.shape) * dtype_of(tensor.dtype, tensor.name).itemsize)
            return compress_factors(factored.matrix, rank), factored.statistics
        rows, columns = tensor.shape
        changes = _Changes(tensor, self._work, self._resources, self._meter)
        compressed = compress_blocks(changes.sweep, (rows, columns), rank, tensor.name)
        if transposed:
            turned = LowRank(compressed.matrix.right.T, compressed.matrix.left.T)
            compressed = replace(compressed, matrix=turned)
        self._meter.advance(math.prod(tensor.shape) * dtype_of(tensor.dtype, tensor.name).itemsize)
        return compressed, changes.statistics()

    def _factored(self, tensor: TensorPlan) -> Factored | None:
        """The merged ΔW where it is a product of thin factors from the start."""
        if isinstance(self._way, Factoring):
            return self._way.factored(tensor, self._meter.watch)
        if isinstance(self._way, Voting) and self._plan.method in ("linear", "task_arithmetic") and is_low_rank(tensor):
            return _summed(self._plan, self._way, tensor, self._resources)
        return None

    def _measure(self, tensor: TensorPlan) -> TensorStatistics:
        """Whether a tensor changes at all that no factors hold."""
        changes = _Changes(tensor, self._work, self._resources, self._meter)
        for _ in changes.sweep(lambda _block: torch.empty(0)):
            pass
        self._meter.advance(math.prod(tensor.shape) * dtype_of(tensor.dtype, tensor.name).itemsize)
        found = changes.statistics()
        kept = self._adapter.other == "save" or found.merged_norm == 0
        return replace(found, retained_energy=1.0 if kept else 0.0)

    def _copy(self, tensor: TensorPlan, writer: ShardWriter, buffers: Buffers) -> None:
        """A tensor as the checkpoint would hold it."""
        work = self._work(tensor, self._meter.watch)
        itemsize = dtype_of(tensor.dtype, tensor.name).itemsize

        def of_block(item: tuple[Block, torch.Tensor]) -> tuple[Block, torch.Tensor]:
            block, buffer = item
            with self._resources.scratches.borrow() as scratch:
                work(block, buffer, scratch)
            return item

        items = ((block, buffers.take()) for block in cut(tensor.shape))
        for block, buffer in self._resources.crew.in_order(of_block, items):
            writer.write(buffer, block.size * itemsize)
            self._meter.check()

    def _cast(self, tensor: TensorPlan, values: torch.Tensor) -> torch.Tensor:
        cast = values.to(dtype_of(tensor.dtype, tensor.name)).contiguous()
        if not all_finite(cast):
            raise overflow(tensor)
        return cast

    def _check_energy(self, held: Iterable[TensorPlan], found: Mapping[str, TensorStatistics]) -> None:
        least = self._adapter.min_retained_energy
        energies = {tensor.name: found[tensor.name].retained_energy or 0.0 for tensor in held}
        low = sorted((energy, name) for name, energy in energies.items() if least is not None and energy < least)
        if low:
            worst = ", ".join(f"{name} {energy:.4f}" for energy, name in low[:SHOWN])
            more = f" and {len(low) - SHOWN} more" if len(low) > SHOWN else ""
            raise MergeyardError(
                "energy_too_low",
                f"At rank {self._adapter.rank} these keep less than {least:g} of their change: {worst}{more}. Raise "
                "the rank, lower min_retained_energy, or write a checkpoint.",
                where="output.min_retained_energy",
            )


def adapter_config(plan: Plan, adapter: AdapterPlan, statistics: Mapping[str, TensorStatistics]) -> dict[str, object]:
    """adapter_config.json: the plan's, with what was saved whole because it changed."""
    planned = plan.documents[CONFIG_NAME]
    assert isinstance(planned, Mapping)
    config: dict[str, object] = dict(planned)
    if adapter.other == "save":
        layers = {place.module for place in adapter.places.values() if place.factors}
        whole = [
            place for name, place in adapter.places.items() if not place.factors and statistics[name].merged_norm > 0
        ]
        if any(place.module in layers for place in whole):
            config["bias"] = "lora_only"
        modules = {place.module for place in whole if place.module not in layers}
        tied = {place.tied for place in whole if place.tied}
        config["modules_to_save"] = sorted(modules | tied) or None
        config["ensure_weight_tying"] = bool(tied)
    return config


@dataclass(slots=True)
class _Changes:
    """What a merge changes in a tensor, block by block: result minus base, as a float32 checkpoint would have it."""

    tensor: TensorPlan
    work: Callable[[TensorPlan, Pulse], BlockWork]
    resources: Resources
    meter: Meter
    _work: BlockWork | None = None
    _total: StatisticsSum | None = None

    def sweep(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """``apply`` on the rows of each block, float64; the results in order."""
        tensor = replace(self.tensor, dtype="F32")
        if self._work is None:
            self._work = self.work(tensor, self.meter.watch)
        work, total = self._work, StatisticsSum(tensor)
        width = tensor.shape[-1] if tensor.shape else 1

        def of_block(block: Block) -> tuple[BlockStatistics | None, torch.Tensor]:
            with self.resources.scratches.borrow() as scratch:
                merged = scratch.bytes("merged", block.size * 4)
                found = work(block, merged, scratch)
                change = merged.view(torch.float32).double()
                change -= self._base(tensor, block, scratch)
                rows = change.view(-1, width) if block.size % width == 0 else change.view(1, -1)
                return found, apply(rows)

        for block, (found, result) in zip(
            cut(tensor.shape), self.resources.crew.in_order(of_block, cut(tensor.shape)), strict=True
        ):
            if found is not None:
                total.add(found)
            self.meter.watch(tensor, block)
            yield result
        self._total = total

    def statistics(self) -> TensorStatistics:
        """Of the last whole sweep."""
        assert self._total is not None
        return self._total.result()

    def _base(self, tensor: TensorPlan, block: Block, scratch: Scratch) -> torch.Tensor:
        base = scratch.floats("restored", block.size)
        self.resources.reader.float32(tensor.base, block.start, block.stop, base, scratch.bytes("raw", block.size * 8))
        return base


def _summed(plan: Plan, way: Voting, tensor: TensorPlan, resources: Resources) -> Factored:
    """A weighted sum of low-rank matrices is their factors side by side."""
    sources, transposed = read_factors(plan, tensor, resources.reader)
    weights, rule = way.method.weights(tensor), way.method.rule(tensor, sources=len(plan.sources))
    divisor = sum(weights) if rule.divisor == "weights" else 1.0
    share = rule.scale / (divisor if abs(divisor) >= SMALLEST_DIVISOR else 1.0)
    left = torch.cat([source.left * (weight * share) for source, weight in zip(sources, weights, strict=True)], 1)
    merged = FactorMerge(LowRank(left, torch.cat([source.right for source in sources], 0)))
    return Factored(matrix=merged.matrix, transposed=transposed, statistics=statistics_of(tensor, sources, merged))


def _padded(values: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    shape = list(values.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([values, values.new_zeros(shape)], axis)


def _write(values: torch.Tensor, writer: ShardWriter, buffers: Buffers) -> None:
    """A small tensor, in pieces of a buffer's size."""
    flat = values.flatten().view(torch.uint8)
    for start in range(0, len(flat), buffers.size):
        piece = flat[start : start + buffers.size]
        buffer = buffers.take()
        buffer[: len(piece)] = piece
        writer.write(buffer, len(piece))
