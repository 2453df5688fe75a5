"""The ``cuda`` room: Triton kernels on one GPU, behind the one signature of the rooms."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from worker.engine.kernels.cuda import (
    collect,
    count_equal,
    elected_balance,
    equals,
    form,
    histogram,
    kept_l1,
    merge,
)
from worker.engine.kernels.cuda.operands import (
    EQUALS,
    HIGH,
    LOW,
    THRESHOLD,
    WEIGHT,
    Operands,
    bits,
    lay_out,
    shape_of,
    size_of,
    trim_numbers,
)
from worker.engine.kernels.cuda.workspace import Workspace
from worker.engine.kernels.signature import BlockStatistics, Delta, Product, Rule, Trim


class CudaKernels:
    """The ``cuda`` room; see ``signature.Kernels`` for shapes and meanings.

    ``device``: a GPU, or the CPU, where Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) carries out
    the same kernels for their numbers' sake. Calls of several threads overlap; each is over when it returns.
    """

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        # the interpreter puts its own functions into triton's modules while a kernel runs
        self._interpreter = threading.Lock()

    def place(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._device)

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def form(self, delta: Delta, out: torch.Tensor) -> None:
        with self._call() as workspace:
            form.form(lay_out([delta], workspace, [{}]), workspace.result(out))

    def histogram(self, delta: Delta, counts: torch.Tensor, prefix: int | None) -> None:
        with self._call() as workspace:
            staged = workspace.staged(counts)
            histogram.histogram(lay_out([delta], workspace, [{}]), staged, prefix, workspace)
            if staged is not counts:
                counts.copy_(staged)

    def collect(
        self, deltas: Sequence[Delta], brackets: Sequence[tuple[int, int]], found: torch.Tensor
    ) -> list[tuple[int, int]]:
        with self._call() as workspace:
            numbers = [{LOW.value: low, HIGH.value: high} for low, high in brackets]
            counts = workspace.zeros(2 * len(deltas), torch.int64)
            same = found.device.type == self._device.type
            room = found if same else workspace.empty(found.numel(), torch.int32).view(found.shape)
            collect.collect(lay_out(_alike(deltas, workspace), workspace, numbers), room, counts)
            pairs = counts.view(-1, 2).tolist()
            if not same:
                for row, own, (_, inside) in zip(found, room, pairs, strict=True):
                    row[:inside].copy_(own[:inside], non_blocking=True)
        return [(above, inside) for above, inside in pairs]

    def count_equal(self, delta: Delta, threshold: int) -> int:
        with self._call() as workspace:
            count = workspace.zeros(1, torch.int64)
            count_equal.count_equal(lay_out([delta], workspace, [{THRESHOLD.value: threshold}]), count)
            return int(count)

    def kept_l1(self, delta: Delta, trim: Trim) -> float:
        with self._call() as workspace:
            operands, divided = _trimmed([delta], [trim], [1.0], workspace)
            return float(kept_l1.kept_l1(operands, divided=divided, workspace=workspace))

    def elected_balance(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], rule: Rule
    ) -> int:
        with self._call() as workspace:
            operands, divided = _trimmed(deltas, trims, weights, workspace)
            balance = workspace.zeros(1, torch.int64)
            elected_balance.elected_balance(operands, rule, balance, divided=divided)
            return int(balance)

    def merge(
        self,
        base: torch.Tensor,
        deltas: Sequence[Delta],
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        with self._call() as workspace:
            origin = workspace.staged(base)
            operands, divided = _trimmed(deltas, trims, weights, workspace, origin)
            result = workspace.result(out)
            counted = merge.merge(operands, origin, weights, rule, result, divided=divided, workspace=workspace)
            (*kept, active, conflicts, overflows), (*squares, merged_square) = counted.fetch()
        return BlockStatistics(
            kept=tuple(kept),
            squares=tuple(squares),
            active=active,
            conflicts=conflicts,
            merged_square=merged_square,
            finite=overflows == 0 and math.isfinite(merged_square),
        )

    @contextlib.contextmanager
    def _call(self) -> Iterator[Workspace]:
        """The calling thread's workspace, for one call."""
        workspace: Workspace | None = getattr(self._own, "workspace", None)
        if workspace is None:
            workspace = self._own.workspace = Workspace(self._device)
        with self._one_interpreter(), workspace.call():
            yield workspace

    @contextlib.contextmanager
    def _one_interpreter(self) -> Iterator[None]:
        if self._device.type == "cuda":
            yield
        else:
            with self._interpreter, np.errstate(all="ignore"):
                yield


def _trimmed(
    deltas: Sequence[Delta],
    trims: Sequence[Trim],
    weights: Sequence[float],
    workspace: Workspace,
    base: torch.Tensor | None = None,
) -> tuple[Operands, bool]:
    """The operands with their trims, and whether any source keeps only some of its equals."""
    size = size_of(deltas[0])
    deltas = _alike(deltas, workspace)
    numbers = [
        trim_numbers(trim, size) | {WEIGHT.value: bits(weight)} for trim, weight in zip(trims, weights, strict=True)
    ]
    operands = lay_out(deltas, workspace, numbers, base)
    divided = [source for source, fields in enumerate(numbers) if fields[EQUALS.value]]
    if divided:
        equals.find_cuts(operands, divided, workspace)
    return operands, bool(divided)


def _alike(deltas: Sequence[Delta], workspace: Workspace) -> list[Delta]:
    """Products of one shape, whose tiles lie alike; those of another (rows seen as one, say) are formed first."""
    shapes = [shape_of(delta) for delta in deltas if isinstance(delta, Product)]
    alike: list[Delta] = []
    for delta in deltas:
        if isinstance(delta, Product) and shape_of(delta) != shapes[0]:
            formed = workspace.empty(size_of(delta), torch.float32)
            form.form(lay_out([delta], workspace, [{}]), formed)
            alike.append(formed)
        else:
            alike.append(delta)
    return alike
