"""Gram matrices and order statistics over many blocks equal those of the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from app.errors import MergeyardError
from app.planning.plan import TensorPlan
from tests.engine.merges import plan_of
from tests.files import write_model
from worker.engine import blocks
from worker.engine.blocks import Crew
from worker.engine.deltas import Deltas, Scratch, ScratchPool
from worker.engine.kernels import load
from worker.engine.ranking import largest
from worker.engine.reader import Reader
from worker.engine.reductions import Grouping, combined, gram, gram_of_rows, total
from worker.engine.tensors import pass_over
from worker.engine.views import Resources, TensorPass

# rows of 6 that fill blocks of 24, rows of 90 that are cut, vectors longer than a block, one axis
SHAPES = [(40, 6), (7, 9, 10), (5, 3, 4, 11), (100,), (2, 50)]


@contextmanager
def passing(
    root: Path, sources: list[torch.Tensor], threads: int = 3, base: torch.Tensor | None = None
) -> Iterator[TensorPass]:
    write_model(root / "base", {"w": torch.zeros_like(sources[0]) if base is None else base})
    for index, values in enumerate(sources):
        write_model(root / f"x{index}", {"w": values})
    models = [{"model": f"x{index}"} for index in range(len(sources))]
    plan = plan_of(root, {"base_model": "base", "merge_method": "sce", "models": models})

    def ignore(_tensor: TensorPlan, _block: blocks.Block) -> None:
        pass

    with Crew(threads) as crew, Reader() as reader:
        kernels = load("cpu")
        scratches = ScratchPool(kernels.memory)
        deltas = Deltas([source.reference for source in plan.sources], reader, kernels, 1 << 20)
        resources = Resources(kernels=kernels, crew=crew, reader=reader, scratches=scratches, deltas=deltas)
        yield pass_over(plan, deltas.open(plan.tensors[0], [1.0] * len(sources)), resources, ignore)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 24)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("along", ["whole", "columns"])
def test_gram_over_blocks_is_the_gram_of_the_tensor(shape: tuple[int, ...], along: str, tmp_path: Path) -> None:
    sources = [random(*shape, seed=seed) for seed in range(3)]
    flat = torch.stack(sources).double().view(3, shape[0], -1)
    whole = along == "whole" or len(shape) == 1
    expected = torch.einsum("krc,lrc->kl", flat, flat)[None] if whole else torch.einsum("krc,lrc->ckl", flat, flat)
    grouping = Grouping.whole(shape) if along == "whole" else Grouping.columns(shape)
    with passing(tmp_path, sources) as tensor:
        assert len(tensor.deltas.blocks) > 1
        found = gram(tensor, lambda view: view.deltas, grouping)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1])
def test_the_gram_of_rows_lies_within_a_block(shape: tuple[int, ...], tmp_path: Path) -> None:
    sources = [random(*shape, seed=seed) for seed in range(2)]
    grouping = Grouping.rows(shape)
    with passing(tmp_path, sources) as tensor:
        parts = list(tensor.each(lambda view: gram_of_rows(view.block, view.deltas, grouping)))
    rows = torch.stack(sources).double().view(2, -1, shape[-1])
    torch.testing.assert_close(torch.cat(parts), torch.einsum("krc,lrc->rkl", rows, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_column_takes_its_own_coefficients(shape: tuple[int, ...], tmp_path: Path) -> None:
    sources = [random(*shape, seed=seed) for seed in range(2)]
    grouping = Grouping.columns(shape)
    columns = grouping.width if grouping.along == "columns" else 1
    coefficients = random(columns, 2, seed=9).double()
    with passing(tmp_path, sources) as tensor:
        parts = list(tensor.each(lambda view: combined(view.block, view.deltas, coefficients, grouping)))
    flat = torch.stack(sources).view(2, -1, columns)
    expected = (coefficients.float().T[:, None, :] * flat).sum(0).reshape(-1)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("coarse", [False, True], ids=["all-different", "many-equal"])
@pytest.mark.parametrize("k", [0, 1, 17, 239, 240])
def test_the_k_largest_and_among_equals_the_first(coarse: bool, k: int, tmp_path: Path) -> None:
    values = [random(40, 6, seed=seed).abs() for seed in range(2)]
    if coarse:
        values = [value.round() for value in values]
    with passing(tmp_path, values) as tensor:
        cuts = largest(tensor, lambda view: view.deltas, [[k], [3, k]])
        held = [
            torch.cat(list(tensor.each(lambda view, i=i: cuts[i][-1].holds(view.block, view.deltas[i]))))
            for i in range(2)
        ]
    for index, value in enumerate(values):
        order = value.reshape(-1).argsort(descending=True, stable=True)
        assert sorted(held[index].nonzero().reshape(-1).tolist()) == sorted(order[:k].tolist())
        if k:
            assert cuts[index][-1].value == value.reshape(-1)[order[k - 1]].item()


def test_sums_do_not_depend_on_threads(tmp_path: Path) -> None:
    values = [random(1000, 6) * 1e3]
    found = set()
    for threads in (1, 2, 7):
        root = tmp_path / str(threads)
        with passing(root, values, threads) as tensor:
            found.add(float(total(tensor, lambda view: view.deltas.double().pow(3).sum())))
    assert len(found) == 1


def test_what_is_not_finite_is_named_before_it_is_summed(tmp_path: Path) -> None:
    values = [random(40, 6), random(40, 6, seed=1)]
    values[1][35, 2] = torch.nan
    with passing(tmp_path, values) as tensor, pytest.raises(MergeyardError, match="x1 holds NaN") as refused:
        total(tensor, lambda view: view.deltas.sum(1))
    assert refused.value.code == "source_not_finite"


def test_sources_are_as_their_files_have_them(tmp_path: Path) -> None:
    """base + (x - base) rounds twice; x itself does not."""
    values = random(40, 6) * 1e-4
    with passing(tmp_path, [values], base=random(40, 6, seed=1) * 1e4) as tensor:
        block = tensor.deltas.blocks[1]
        found = tensor.view(block, Scratch(tensor.kernels.memory)).sources.clone()
    assert torch.equal(found[0], values.reshape(-1)[block.start : block.stop])
