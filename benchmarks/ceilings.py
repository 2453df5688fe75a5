"""What one core of this machine can do at most of each kind of work a merge is made of, measured here and now.

All in units of one second of a core's processor time, so that others' work on the machine changes little.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch

from app.artifacts.disk import Filling, reserve
from benchmarks import spans, synthetic
from worker.engine.blocks import BLOCK_VALUES
from worker.engine.kernels import load
from worker.engine.kernels.signature import Product

PIECE = 1 << 20  # bytes; as a block's result has them
FILE_BYTES = 1 << 28
COPIED = 1 << 26  # float32, far beyond any cache
MATRIX = 2048
COLUMNS = 2048
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Of one core: bytes/s, and float32 operations/s for ``form`` (the engine's own products) and ``peak``."""

    sha256: float
    copy: float
    reading: float
    writing: float
    form: float
    peak: float

    def of_kind(self, kind: str) -> float | None:
        """The ceiling of a kind of benchmarks/spans.py, in bytes/s."""
        return {
            spans.HASHING_SOURCES: self.sha256,
            spans.HASHING_RESULT: self.sha256,
            spans.READING: self.reading,
            spans.READING_TO_HASH: self.reading,
            spans.WRITING: self.writing,
        }.get(kind)


TITLES = {
    "sha256": ("sha256 by hashlib, pieces of 1 MiB", "GB/s"),
    "copy": ("copying memory, read plus written", "GB/s"),
    "reading": ("reading a file in the page cache, pieces of 1 MiB into the same memory", "GB/s"),
    "writing": ("writing a file as results are: reserved, 1 MiB at a time, handed to the disk meanwhile", "GB/s"),
    "form": ("the engine's products alone, rank 16 (multiply, then add)", "GFLOP/s"),
    "peak": ("a large float32 matrix product by torch (fused multiply-adds)", "GFLOP/s"),
}


def measure(folder: Path) -> Ceilings:
    """``folder``: on the disk that is merged to; a file of 256 MiB is written there, and removed."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        writing, reading = _files(folder / "ceilings")
        return Ceilings(sha256=_sha256(), copy=_copy(), reading=reading, writing=writing, form=_form(), peak=_peak())
    finally:
        torch.set_num_threads(held)


def median_of(found: Sequence[Ceilings]) -> Ceilings:
    return Ceilings(**{own.name: median(getattr(one, own.name) for one in found) for own in fields(Ceilings)})


def table(limits: Ceilings) -> str:
    rows = ["| what | a core-second |", "| --- | --- |"]
    for name, (title, unit) in TITLES.items():
        value = getattr(limits, name) / 1e9
        rows.append(f"| {title} | {value:.{0 if unit.startswith('GF') else 1}f} {unit.removesuffix('/s')} |")
    return "\n".join(rows)


def read_through(folders: Sequence[str]) -> None:
    """So that it lies in the page cache."""
    piece = bytearray(1 << 24)
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(piece):
                    pass


def _sha256() -> float:
    piece, digest = bytes(PIECE), hashlib.sha256()
    return PIECE / _seconds(lambda: digest.update(piece))


def _copy() -> float:
    left, right = torch.ones(COPIED), torch.ones(COPIED)
    return 2 * left.nbytes / _seconds(lambda: left.copy_(right))


def _form() -> float:
    generator = torch.Generator().manual_seed(1)
    rows = BLOCK_VALUES // COLUMNS
    left, right = (
        torch.randn(shape, generator=generator) for shape in ((rows, synthetic.RANK), (synthetic.RANK, COLUMNS))
    )
    out, kernels = torch.empty(rows * COLUMNS), load("cpu")
    return 2 * synthetic.RANK * len(out) / _seconds(lambda: kernels.form(Product(left, right, 2.0), out))


def _peak() -> float:
    left, right = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX, MATRIX)
    out = torch.empty_like(left)
    return 2 * MATRIX**3 / _seconds(lambda: torch.mm(left, right, out=out))


def _files(path: Path) -> tuple[float, float]:
    """Writing and reading, bytes/s."""
    piece = bytearray(PIECE)

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            reserve(descriptor, FILE_BYTES)
            filling, written = Filling(descriptor), 0
            while written < FILE_BYTES:
                written += os.write(descriptor, piece)
                filling.reach(written)
        finally:
            os.close(descriptor)

    def read() -> None:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass

    try:
        writing = FILE_BYTES / _seconds(write, before=lambda: path.unlink(missing_ok=True))
        return writing, FILE_BYTES / _seconds(read)
    finally:
        path.unlink(missing_ok=True)


def _seconds(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The median of this thread's processor time; the first run touches memory and compiles."""
    times = []
    for _ in range(REPEATS + 1):
        before()
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return median(times[1:])
