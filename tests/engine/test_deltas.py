"""What is kept of Δ between passes: a buffer for each of two tensors, within the budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.engine.merges import plan_of
from tests.files import llama_tensors, write_model
from worker.engine.deltas import Deltas, Scratch
from worker.engine.kernels import load
from worker.engine.reader import Reader


def test_there_are_never_more_than_two_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "base")
    # a dtype that no kernel reads, so that δ is formed first
    write_model(tmp_path / "tuned", {name: value.double() for name, value in llama_tensors(seed=1).items()})
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"model": "tuned"}]}
    tensors = sorted(plan_of(tmp_path, recipe).tensors, key=lambda tensor: math.prod(tensor.shape))
    made: list[StorageWeakRef] = []
    allocate = torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        buffer = options["dtype"] is torch.float32 and size != (0,)  # scratch is bytes
        assert not buffer or sum(not earlier.expired() for earlier in made) < 2, "three at once"
        tensor = allocate(*size, **options)
        if buffer:
            made.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with Reader() as reader:
        kernels = load("cpu")
        deltas, scratch = Deltas(["tuned"], reader, kernels), Scratch(kernels.memory)
        monkeypatch.setattr(torch, "empty", watched)
        for tensor in tensors:
            opened = deltas.open(tensor, [1.0])  # the last one is still held here, as by a pass
            for block in opened.blocks:
                opened.of(block, scratch)
    assert len(made) > 2, "the buffers have to grow"


def test_a_tensor_that_is_asked_for_again_keeps_its_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned", {name: value.double() for name, value in llama_tensors(seed=1).items()})
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"model": "tuned"}]}
    first, second, third = plan_of(tmp_path, recipe).tensors[:3]
    with Reader() as reader:
        kernels = load("cpu")
        deltas, scratch = Deltas(["tuned"], reader, kernels), Scratch(kernels.memory)
        deltas.open(first, [1.0])
        deltas.open(second, [1.0])
        again = deltas.open(first, [1.0])
        held = again.operands(again.blocks[0], scratch)[0]
        assert isinstance(held, torch.Tensor)
        before = held.clone()
        newest = deltas.open(third, [1.0])
        newest.operands(newest.blocks[0], scratch)
        assert torch.equal(held, before)
        assert deltas.open(first, [1.0]) is again
