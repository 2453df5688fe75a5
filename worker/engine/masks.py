"""Random masks that depend on nothing but a seed and what they mask: not on blocks, threads or the order of sources.

Every value of a source's tensor has a number of its own in [0, 1): its flat index is a place in the stream of the
counter-based generator Philox-4x64 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*), keyed by the
recipe's seed, the tensor's name and the source. NumPy promises that the raw integers of a bit generator never change.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt
import torch

_WORDS = 4  # of 64 bits, for each step of Philox's counter


def keep_mask(
    seed: int, tensor: str, source: str, start: int, stop: int, probabilities: float | torch.Tensor
) -> torch.Tensor:
    """Which of the flat values ``start`` up to ``stop`` are kept, bool (n,).

    ``probabilities``: of being kept, one for all or (n,): at 0 none is, at 1 all are. ``source``: its identity.
    """
    uniform = torch.from_numpy(_uniform(_key(seed, tensor, source), start, stop))
    return uniform < (probabilities.double() if isinstance(probabilities, torch.Tensor) else probabilities)


def _key(seed: int, tensor: str, source: str) -> npt.NDArray[np.uint64]:
    """128 bits. As JSON no two triples read alike, whatever is in the names."""
    text = json.dumps([seed, tensor, source])
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")


def _uniform(key: npt.NDArray[np.uint64], start: int, stop: int) -> npt.NDArray[np.float64]:
    """float64 (stop - start,) in [0, 1): the upper 53 bits of each word."""
    skipped = start % _WORDS
    generator = np.random.Philox(key=key, counter=np.array([start // _WORDS, 0, 0, 0], dtype=np.uint64))
    words = generator.random_raw(skipped + stop - start)[skipped:]
    uniform = (words >> np.uint64(11)).astype(np.float64)
    uniform *= 2.0**-53
    return uniform
