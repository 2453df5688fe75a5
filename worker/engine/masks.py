"""Random masks that depend on nothing but a seed and what they mask: not on blocks, threads or the order of sources.

Every value of a source's tensor has a number of its own in [0, 1), and stays where that is below its probability. Its
flat index is a place in the stream of the counter-based generator Philox-4x64 (Salmon et al. 2011, *Parallel random
numbers: as easy as 1, 2, 3*), keyed by the recipe's seed, the tensor's name and the source; the upper 53 bits of the
word there are the number. NumPy promises that the raw integers of a bit generator never change.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt
import torch

_WORDS = 4  # of 64 bits, for each step of Philox's counter
_BITS = 53  # of a word that make a value's number, as many as float64 holds
_SPARE = np.uint64(64 - _BITS)


def keep_mask(
    seed: int, tensor: str, source: str, start: int, stop: int, probabilities: float | torch.Tensor
) -> torch.Tensor:
    """Which of the flat values ``start`` up to ``stop`` are kept, bool (n,).

    ``probabilities``: of being kept, one for all or (n,): at 0 none is, at 1 all are. ``source``: its identity.
    """
    words = _words(_key(seed, tensor, source), start, stop)
    if isinstance(probabilities, torch.Tensor):
        return torch.from_numpy((words >> _SPARE).astype(np.float64)) < probabilities.double() * 2.0**_BITS
    return torch.from_numpy((words >> _SPARE) < math.ceil(probabilities * 2.0**_BITS))


def _key(seed: int, tensor: str, source: str) -> npt.NDArray[np.uint64]:
    """128 bits. As JSON no two triples read alike, whatever is in the names."""
    text = json.dumps([seed, tensor, source])
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")


def _words(key: npt.NDArray[np.uint64], start: int, stop: int) -> npt.NDArray[np.uint64]:
    """uint64 (stop - start,), from the place ``start`` of the key's stream on."""
    skipped = start % _WORDS
    generator = np.random.Philox(key=key, counter=np.array([start // _WORDS, 0, 0, 0], dtype=np.uint64))
    return generator.random_raw(skipped + stop - start)[skipped:]
