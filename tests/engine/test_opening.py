"""Opening tensors ahead: one and no more, errors in their place, and an end when nobody wants the rest."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch

from app.planning.plan import TensorPlan
from tests.engine.one_tensor import plan_of
from worker.engine import opening
from worker.engine.blocks import Block
from worker.engine.deltas import Scratch
from worker.engine.kernels.signature import BlockStatistics
from worker.engine.opening import opened_ahead
from worker.engine.tensors import BlockWork
from worker.engine.trimming import Pulse

TENSORS = [plan_of(size, {}, []) for size in (1, 2, 3, 4)]
BLOCK = Block(0, 0, 1)


def work(_block: Block, _buffer: torch.Tensor, _scratch: Scratch) -> BlockStatistics | None:
    return None


def nothing() -> None:
    pass


def test_at_most_one_is_opened_beyond_the_one_handed_out() -> None:
    opened: list[TensorPlan] = []

    def open_tensor(tensor: TensorPlan, _pulse: Pulse) -> BlockWork:
        opened.append(tensor)
        return work

    handed = []
    with contextlib.closing(opened_ahead(TENSORS, open_tensor, nothing)) as ahead:
        for tensor, found in ahead:
            handed.append(tensor)
            time.sleep(0.05)
            assert found is work
            assert opened in (TENSORS[: len(handed)], TENSORS[: len(handed) + 1])
    assert handed == TENSORS


def test_an_error_is_raised_where_its_tensor_would_be() -> None:
    def open_tensor(tensor: TensorPlan, _pulse: Pulse) -> BlockWork:
        if tensor is TENSORS[2]:
            raise TimeoutError("of its own")
        return work

    ahead = opened_ahead(TENSORS, open_tensor, nothing)
    assert [next(ahead)[0], next(ahead)[0]] == TENSORS[:2]
    with pytest.raises(TimeoutError, match="of its own"):
        next(ahead)


def test_a_tensor_that_is_ready_just_after_the_wait_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Future[BlockWork]):
        """Done between the end of a wait and the look at why it ended."""

        def result(self, timeout: float | None = None) -> BlockWork:
            if self.done():
                return super().result(timeout)
            self.set_result(work)
            raise TimeoutError

    class Pool(ThreadPoolExecutor):
        def submit(self, *_work: Any) -> Any:  # type: ignore[override]
            return Late()

    monkeypatch.setattr(opening, "ThreadPoolExecutor", Pool)
    assert [tensor for tensor, _ in opened_ahead(TENSORS, lambda *_: work, nothing)] == TENSORS


def test_closing_ends_the_pass_that_is_under_way() -> None:
    begun, ended = Event(), Event()

    def open_tensor(tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        try:
            while tensor is TENSORS[1]:
                pulse(tensor, BLOCK)
                begun.set()
                time.sleep(0.01)
        finally:
            if tensor is TENSORS[1]:
                ended.set()
        return work

    with contextlib.closing(opened_ahead(TENSORS, open_tensor, nothing)) as ahead:
        next(ahead)
        assert begun.wait(10)
    assert ended.is_set()


def test_the_caller_has_its_say_while_it_waits() -> None:
    def open_tensor(tensor: TensorPlan, pulse: Pulse) -> BlockWork:
        while True:
            pulse(tensor, BLOCK)
            time.sleep(0.01)

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(opened_ahead(TENSORS, open_tensor, check))
