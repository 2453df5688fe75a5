"""safetensors headers: read without trusting them, and made. No weights, no torch, bounded memory.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import strict_json
from app.errors import MergeyardError
from app.sources.opening import open_source
from app.sources.source import RemoteFile, SourceFile, TensorSpec

MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8
MAX_NAME = 512
MAX_EMPTY_SIZE = 1 << 24  # of a tensor that holds nothing, so that a small file cannot stand for a vast result
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})  # what a merge can compute with


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: tensors in file order, and the file they lie in."""

    file: SourceFile
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file that is to be written: its key, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def header(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """A header: the length (u64, little-endian) and JSON padded with spaces to 8 bytes. Tensors lie without gaps."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path, name: str = "", remote: RemoteFile | None = None) -> Header:
    """Read and check one file's header. ``name`` is what the file is called inside its model (its own, if not given).

    Of a ``remote`` one nothing but the header is here.

    Raises:
        MergeyardError: `source_format` where lengths, offsets, dtypes, shapes or sizes do not add up;
            `source_not_found` where the file is missing.
    """
    name = name or path.name
    try:
        with os.fdopen(open_source(path), "rb") as stream:
            status = os.fstat(stream.fileno())
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise _bad(name, "it is too short to be a safetensors file")
            if length > MAX_HEADER_BYTES:
                raise _bad(name, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
            text = stream.read(length)
    except OSError as error:
        raise MergeyardError("source_not_found", f"{name} cannot be read: {error.strerror}") from None
    if len(text) < length or length < 2:
        raise _bad(name, "it ends inside its header; it is truncated")
    if not text.startswith(b"{"):
        raise _bad(name, "its header is not a JSON object")
    try:
        raw = strict_json.loads(text)
    except ValueError as error:
        raise _bad(name, f"its header is not valid JSON ({error})") from None
    file = SourceFile(
        name=name,
        path=path,
        size=status.st_size if remote is None else remote.size,
        mtime_ns=status.st_mtime_ns,
        header_sha256=hashlib.sha256(prefix + text).hexdigest(),
        remote=remote,
    )
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(name, "its metadata is not a map of strings")
    tensors = sorted(
        (_tensor(file, key, entry, data_start=8 + length) for key, entry in raw.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes, tensor.name),
    )
    _check_layout(file, tensors, data_start=8 + length)
    return Header(file=file, tensors={tensor.name: tensor for tensor in tensors})


def _tensor(file: SourceFile, name: str, entry: Any, *, data_start: int) -> TensorSpec:
    if len(name) > MAX_NAME or not name.isprintable():
        raise _bad(file.name, f"a tensor is called {name[:40]!r}, which is no printable name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(file.name, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(file.name, f"{name!r} has the dtype {str(dtype)[:20]!r}, which is not accepted")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_size(item) for item in shape):
        raise _bad(file.name, f"the shape of {name!r} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_size(item) for item in offsets):
        raise _bad(file.name, f"the offsets of {name!r} are not two positions")
    begin, end = offsets
    if begin == end and max(shape, default=0) > MAX_EMPTY_SIZE:
        raise _bad(file.name, f"{name!r} has no values, and a size above {MAX_EMPTY_SIZE}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _bad(file.name, f"{name!r} has {end - begin} bytes, its shape and dtype need another number")
    return TensorSpec(
        name=name, dtype=dtype, shape=tuple(shape), file=file, offset=data_start + begin, nbytes=end - begin
    )


def _check_layout(file: SourceFile, tensors: list[TensorSpec], *, data_start: int) -> None:
    expected = data_start
    for tensor in tensors:
        if tensor.offset < expected:
            raise _bad(file.name, f"{tensor.name!r} overlaps the tensor before it")
        if tensor.offset > expected:
            raise _bad(file.name, f"there is a gap before {tensor.name!r}")
        expected += tensor.nbytes
    if file.size < expected:
        raise _bad(
            file.name,
            f"it has {file.size} bytes and its header needs {expected}; it is truncated, fetch it again",
        )
    if file.size > expected:
        raise _bad(file.name, f"{file.size - expected} bytes follow its last tensor")


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _bad(name: str, what: str) -> MergeyardError:
    return MergeyardError("source_format", f"{name} is not an acceptable safetensors file: {what}.")
