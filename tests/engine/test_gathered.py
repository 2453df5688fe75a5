"""Tensors put together from rows of others read like any stored tensor, from any place to any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.sources.safetensors import read_header
from app.sources.source import GatheredTensor, Row, Run, TensorSpec, assembled, gathered, joined
from worker.engine.reader import Reader

ROWS, WIDTH = 7, 6


def stored(folder: Path, name: str, values: torch.Tensor) -> TensorSpec:
    save_file({name: values}, folder / f"{name}.safetensors")
    return read_header(folder / f"{name}.safetensors").tensors[name]


def read(tensor: GatheredTensor, start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start,), torch.nan)
    with Reader() as reader:
        reader.float32(tensor, start, stop, out, torch.empty((stop - start) * 8, dtype=torch.uint8))
    return out


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_every_range_is_that_of_the_whole(tmp_path: Path, other: torch.dtype) -> None:
    """Rows from two files, a row of zeros, and a mean; 2 x 3 values a row, so that ranges begin within rows."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(ROWS, 2, 3, generator=generator)
    two = torch.randn(ROWS, 2, 3, generator=generator).to(other)
    a, b = stored(tmp_path, "a", one), stored(tmp_path, "b", two)
    rows: list[Row] = [((a, 2),), ((a, 3),), ((b, 6),), (), ((a, 0), (b, 1)), ((a, 5),)]
    wanted = torch.stack([one[2], one[3], two[6].float(), torch.zeros(2, 3), (one[0] + two[1].float()) / 2, one[5]])
    tensor = gathered("w", rows, (2, 3))
    assert tensor.shape == (6, 2, 3)
    for start in range(len(rows) * WIDTH):
        for stop in range(start + 1, len(rows) * WIDTH + 1):
            assert torch.equal(read(tensor, start, stop), wanted.reshape(-1)[start:stop])


def test_neighbours_become_one_run(tmp_path: Path) -> None:
    a = stored(tmp_path, "a", torch.randn(ROWS, 4).bfloat16())
    tensor = gathered("w", [((a, 0),), ((a, 1),), ((a, 2),), (), (), ((a, 4),)], (4,))
    assert tensor.runs == (
        Run(start=0, count=3, parts=((a, 0),)),
        Run(start=3, count=2, parts=()),
        Run(start=5, count=1, parts=((a, 4),)),
    )


def test_a_tensor_counts_as_what_its_parts_are_unless_that_would_round(tmp_path: Path) -> None:
    a, b = (stored(tmp_path, name, torch.randn(ROWS, 4).bfloat16()) for name in ("a", "b"))
    c = stored(tmp_path, "c", torch.randn(ROWS, 4))
    assert gathered("w", [((a, 0),), ((b, 0),)], (4,)).dtype == "BF16"
    assert gathered("w", [((a, 0), (b, 0))], (4,)).dtype == "F32"
    assert gathered("w", [((a, 0),), ((c, 0),)], (4,)).dtype == "F32"


def test_padding_is_the_mean_of_the_rows_before_it(tmp_path: Path) -> None:
    one = torch.randn(ROWS, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    a = stored(tmp_path, "a", one)
    tensor = assembled("w", joined([((a, 4),), (), ((a, 1),)]), (2, 3), padding=2)
    before = torch.stack([one[4].float(), torch.zeros(2, 3), one[1].float()])
    mean = before.double().mean(0).float()
    wanted = torch.stack([*before, mean, mean]).reshape(-1)
    assert (tensor.dtype, tensor.shape) == ("F32", (5, 2, 3))
    for start in range(len(wanted)):
        for stop in range(start + 1, len(wanted) + 1):
            assert torch.equal(read(tensor, start, stop), wanted[start:stop])
