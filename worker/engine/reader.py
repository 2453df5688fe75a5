"""Reading tensors out of source files: exact byte ranges by pread, never a whole file, never a mapping.

Mapped files would count as resident memory and turn a truncated file into SIGBUS; pread does neither.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from types import TracebackType

import numpy as np
import torch

from app.errors import MergeyardError
from app.sources.opening import NOT_FOLLOWED, open_source
from app.sources.source import GatheredTensor, Run, SourceFile, StoredTensor, TensorSpec

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HEADER_LIMIT = 100_000_000
_MEAN_VALUES = 1 << 20  # read at a time for a mean over a whole tensor


def dtype_of(spec_dtype: str, tensor: str) -> torch.dtype:
    """torch's name of a safetensors dtype. Raises ``not_supported`` for packed ones."""
    try:
        return DTYPES[spec_dtype]
    except KeyError:
        raise MergeyardError(
            "not_supported",
            f"Tensor {tensor} is stored as {spec_dtype}, which cannot be read; convert it to 16 bits or more.",
        ) from None


class Reader:
    """Opens each source file once and reads ranges of it from any thread.

    A file whose size, mtime or header is not the plan's raises ``source_changed``, when it is opened and again in
    ``verify``; bytes that cannot be read raise ``source_format``. What an earlier document of the recipe makes is read
    from where it was made (``settle``).
    """

    def __init__(self) -> None:
        self._open: dict[SourceFile, int] = {}
        self._settled: dict[SourceFile, SourceFile] = {}
        self._lock = threading.Lock()
        self._means: dict[int, tuple[GatheredTensor, torch.Tensor]] = {}  # by id: these are too large to hash
        self._means_lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def settle(self, planned: SourceFile, made: SourceFile) -> None:
        """From now on ``planned`` is there, as ``made``. Nobody reads meanwhile."""
        self._settled[planned] = made

    def verify(self) -> None:
        """Every file read so far still is the file that was planned. Raises ``source_changed``."""
        for file, descriptor in self._open.items():
            check_unmoved(file, os.fstat(descriptor))
            check_unmoved(file, stat_of(file))

    def native(self, spec: StoredTensor, start: int, stop: int, scratch: torch.Tensor) -> torch.Tensor:
        """Flat values ``start`` up to ``stop`` as stored: a view of ``scratch`` (uint8, aligned, large enough)."""
        dtype = dtype_of(spec.dtype, spec.name)
        values = scratch[: (stop - start) * dtype.itemsize].view(dtype)
        self._read(spec, start, values)
        return values

    def float32(self, spec: StoredTensor, start: int, stop: int, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """The same range as float32 into ``out`` (n,), by way of ``scratch`` where it is stored otherwise."""
        if spec.dtype == "F32":
            self._read(spec, start, out)
        else:
            out.copy_(self.native(spec, start, stop, scratch))

    def whole(self, spec: TensorSpec) -> torch.Tensor:
        """A whole (small) tensor in float32 and in its shape."""
        dtype = dtype_of(spec.dtype, spec.name)
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._fill(spec, 0, raw)
        return raw.view(dtype).to(torch.float32).reshape(spec.shape)

    def _read(self, spec: StoredTensor, start: int, values: torch.Tensor) -> None:
        """Fill ``values`` (of the tensor's own dtype) from the flat index ``start`` on."""
        if isinstance(spec, TensorSpec):
            self._fill(spec, start * values.dtype.itemsize, values.view(torch.uint8))
            return
        width = math.prod(spec.shape[1:])
        padded_from = (spec.shape[0] - spec.padding) * width
        if start + len(values) > padded_from:
            first = max(start, padded_from)
            row = self._mean_row(spec)
            values[first - start :] = row[torch.arange(first, start + len(values)).sub_(padded_from).remainder_(width)]
            values = values[: first - start]
        for run in _runs_within(spec, start, start + len(values), width):
            first = max(start, run.start * width)
            last = min(start + len(values), (run.start + run.count) * width)
            piece = values[first - start : last - start]
            places = [(part, first - run.start * width + row * width) for part, row in run.parts]
            if len(places) == 1 and places[0][0].dtype == spec.dtype:
                self._read(*places[0], piece)
                continue
            piece.zero_()
            for part, place in places:
                own = torch.empty(len(piece), dtype=dtype_of(part.dtype, part.name))
                self._read(part, place, own)
                piece += own.to(piece.dtype)
            if len(places) > 1:
                piece /= len(places)

    def _mean_row(self, spec: GatheredTensor) -> torch.Tensor:
        """The mean of all rows but the padding, (width,), summed in float64; made once for each tensor."""
        with self._means_lock:
            if id(spec) not in self._means:
                count, width = spec.shape[0] - spec.padding, math.prod(spec.shape[1:])
                total = np.zeros(width)
                step = max(1, _MEAN_VALUES // max(1, width))
                for row in range(0, count, step):
                    values = torch.empty(min(step, count - row) * width)
                    self._read(spec, row * width, values)
                    total += values.numpy().reshape(-1, width).sum(axis=0, dtype=np.float64)
                self._means[id(spec)] = (spec, torch.from_numpy((total / max(1, count)).astype(np.float32)))
            return self._means[id(spec)][1]

    def _fill(self, spec: TensorSpec, start: int, out: torch.Tensor) -> None:
        descriptor = self._descriptor(spec.file)
        offset = spec.offset + start
        view = out.numpy().data
        while view.nbytes:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise MergeyardError("source_format", f"{spec.file.name} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise moved(spec.file)
            view, offset = view[count:], offset + count

    def _descriptor(self, file: SourceFile) -> int:
        with self._lock:
            file = self._settled.get(file, file)
            if file not in self._open:
                self._open[file] = open_unmoved(file, with_header=True)
            return self._open[file]


def _runs_within(spec: GatheredTensor, start: int, stop: int, width: int) -> Iterator[Run]:
    """The runs that hold any of the flat values ``start`` up to ``stop``."""
    first = bisect_right(spec.runs, start, key=lambda run: run.start * width) - 1
    for run in islice(spec.runs, max(first, 0), None):
        if run.start * width >= stop:
            return
        yield run


def open_unmoved(file: SourceFile, *, with_header: bool) -> int:
    """A descriptor of the planned file, its safetensors header checked too on demand.

    Raises ``source_changed`` where it is gone or another one, ``source_format`` where it cannot be opened.
    """
    try:
        descriptor = open_source(file.path)
    except FileNotFoundError:
        raise moved(file) from None
    except OSError as error:
        if error.errno in NOT_FOLLOWED:
            raise moved(file) from None
        raise MergeyardError("source_format", f"{file.name} cannot be opened: {error.strerror}.") from error
    try:
        check_unmoved(file, os.fstat(descriptor))
        if with_header and header_digest(descriptor) != file.header_sha256:
            raise moved(file)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def header_digest(descriptor: int) -> str:
    """sha256 of a safetensors header: the eight-byte length prefix and the JSON."""
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    digest = hashlib.sha256(prefix)
    if length <= _HEADER_LIMIT:  # anything longer was refused when the source was resolved
        digest.update(os.pread(descriptor, length, 8))
    return digest.hexdigest()


def stat_of(file: SourceFile) -> os.stat_result:
    """The file's status by its path. Raises ``source_changed`` where nothing is there any more."""
    try:
        return file.path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise moved(file) from None


def check_unmoved(file: SourceFile, status: os.stat_result) -> None:
    """Raises ``source_changed`` where size or mtime is not the plan's."""
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise moved(file)


def moved(file: SourceFile) -> MergeyardError:
    return MergeyardError("source_changed", f"{file.name} changed after the merge was planned; submit the merge again.")
