"""The exact k-th largest magnitude from histograms, so that exactly k values survive a trim.

A float32's magnitude orders like its 31 bits read as an integer. One pass counts the upper 15 bits, which gives
the coarse bin of the k-th largest; a second counts the lower 16 bits inside that bin, which gives the value. The
counts of blocks, tensors or a whole model add up, so nothing is ever concatenated or sorted.
"""

from __future__ import annotations

import numpy as np
import torch


def coarse_bin(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The coarse bin that holds the k-th largest value, and which largest it is within that bin (from 1).

    ``counts``: int64 (COARSE_BINS,). Raises ValueError unless 1 ≤ k ≤ the number of values counted.
    """
    return _bin_of(counts, k)


def fine_threshold(counts: torch.Tensor, prefix: int, k_left: int) -> tuple[int, int, int]:
    """The k-th magnitude as its 31 bits, how many values equal to it to keep, and how many there are.

    ``counts``: int64 (FINE_BINS,) of the values in coarse bin ``prefix``; ``k_left`` as ``coarse_bin`` gave it.
    Keeping all values above the threshold and that many equal ones keeps exactly k. Raises ValueError as above.
    """
    low, equals_to_keep = _bin_of(counts, k_left)
    return (prefix << 16) | low, equals_to_keep, int(counts[low])


def _bin_of(counts: torch.Tensor, k: int) -> tuple[int, int]:
    # NumPy: torch shares 32768 values out to threads, and waiting for them took 5 ms on a busy machine.
    in_bin = counts.numpy()
    at_or_above = in_bin[::-1].cumsum()[::-1]
    if not 1 <= k <= int(at_or_above[0]):
        raise ValueError(f"no {k}-th largest among {int(at_or_above[0])} values")
    # at_or_above falls from left to right; the bin is the last that still reaches k.
    found = int(np.count_nonzero(at_or_above >= k)) - 1
    return found, k - int(at_or_above[found] - in_bin[found])
