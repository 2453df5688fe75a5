"""Random masks: the same numbers however they are cut, others for every seed, tensor and source."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.masks import keep_mask


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 1000))
def test_a_mask_is_the_same_in_whatever_pieces_it_is_made(sizes: list[int], start: int) -> None:
    stop = start + sum(sizes)
    probabilities = torch.linspace(0, 1, sum(sizes), dtype=torch.float64)
    whole = keep_mask(1, "w", "source", start, stop, probabilities)
    pieces, at = [], 0
    for size in sizes:
        part = probabilities[at : at + size]
        pieces.append(keep_mask(1, "w", "source", start + at, start + at + size, part))
        at += size
    assert torch.equal(torch.cat(pieces), whole)


def test_these_bits_never_change() -> None:
    """Whoever merges the same recipe with a later version gets the same mask."""
    found = keep_mask(7, "model.layers.0.mlp.up_proj.weight", '["sql", 0]', 3, 35, 0.5)
    assert "".join("x" if kept else "." for kept in found) == ".x..x.x..xxxxxx......xx..xx..x.x"


@pytest.mark.parametrize(("seed", "tensor", "source"), [(1, "w", "a"), (0, "v", "a"), (0, "w", "b")])
def test_seed_tensor_and_source_each_change_the_mask(seed: int, tensor: str, source: str) -> None:
    first = keep_mask(0, "w", "a", 0, 10_000, 0.5)
    other = keep_mask(seed, tensor, source, 0, 10_000, 0.5)
    # independent masks agree in half of the places; 5 standard deviations are 250
    assert abs(int((first == other).sum()) - 5000) < 250


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_the_share_that_is_kept_is_the_probability(density: float) -> None:
    n = 1_000_000
    kept = int(keep_mask(0, "w", "a", 0, n, density).sum())
    assert abs(kept - n * density) < 5 * (n * density * (1 - density)) ** 0.5


def test_zero_keeps_nothing_and_one_keeps_everything() -> None:
    assert not keep_mask(0, "w", "a", 0, 100_000, 0.0).any()
    assert keep_mask(0, "w", "a", 0, 100_000, 1.0).all()
