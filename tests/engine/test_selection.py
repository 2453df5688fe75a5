"""The exact k-th magnitude from two histograms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.kernels import load
from worker.engine.kernels.selection import coarse_bin, fine_threshold
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS

KERNELS = load("cpu")
# Few distinct magnitudes, near each other and far apart, so that equals and shared bins are common.
MAGNITUDES = st.one_of(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 2**16, 2**16 + 1, 2**30, 2**31 - 1]))


def _threshold(delta: torch.Tensor, k: int) -> tuple[int, int, int]:
    coarse = torch.zeros(COARSE_BINS, dtype=torch.int64)
    KERNELS.histogram(delta, coarse, None)
    prefix, k_left = coarse_bin(coarse, k)
    fine = torch.zeros(FINE_BINS, dtype=torch.int64)
    KERNELS.histogram(delta, fine, prefix)
    return fine_threshold(fine, prefix, k_left)


@given(magnitudes=st.lists(MAGNITUDES, min_size=1, max_size=60), data=st.data())
@settings(max_examples=150, deadline=None)
def test_threshold_is_the_kth_largest(magnitudes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(magnitudes)))
    delta = torch.tensor(magnitudes, dtype=torch.int32).view(torch.float32)
    threshold, equals_to_keep, equals_present = _threshold(delta, k)
    assert threshold == sorted(magnitudes, reverse=True)[k - 1]
    assert sum(magnitude > threshold for magnitude in magnitudes) + equals_to_keep == k
    assert equals_present == magnitudes.count(threshold)


def test_the_sign_does_not_count() -> None:
    assert _threshold(torch.tensor([1.0, -1.0, 0.5]), 2) == (0x3F800000, 2, 2)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_there_is_no_kth_largest_outside_the_count(k: int) -> None:
    with pytest.raises(ValueError, match="among 3 values"):
        _threshold(torch.tensor([1.0, 2.0, 3.0]), k)


def test_a_fine_histogram_must_hold_the_kth_value() -> None:
    with pytest.raises(ValueError, match="among 0 values"):
        fine_threshold(torch.zeros(FINE_BINS, dtype=torch.int64), 0, 1)
