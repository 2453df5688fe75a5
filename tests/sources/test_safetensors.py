"""safetensors headers are checked, not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.errors import MergeyardError
from app.sources.safetensors import MAX_HEADER_BYTES, read_header


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape if shape is not None else [(end - begin) // 4], "data_offsets": [begin, end]}


def test_a_file_written_by_the_library_is_read_with_its_places(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "a": torch.ones(4)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    spec = header.tensors["b"]
    assert (spec.dtype, spec.shape, spec.nbytes) == ("BF16", (2, 3), 12)
    raw = (tmp_path / "x.safetensors").read_bytes()[spec.offset : spec.offset + spec.nbytes]
    assert torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(0, 8)}, b"\0" * 4, "truncated"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "gap"),
        ({"a": entry(4, 8)}, b"\0" * 8, "gap"),
        ({"a": entry(0, 8)}, b"\0" * 12, "follow its last tensor"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, "need another number"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, "need another number"),
        ({"a": entry(0, 8, dtype="F7")}, b"\0" * 8, "dtype"),
        ({"a": entry(0, 8, [-1, -2])}, b"\0" * 8, "shape"),
        ({"a": entry(0, 8, [2.0])}, b"\0" * 8, "shape"),
        ({"a": entry(0, 0, [0, 1 << 60])}, b"", "shape"),
        ({"a": {"dtype": "F32"}}, b"", "entry"),
        ({"a": entry(0, 4), "__metadata__": {"x": 1}}, b"\0" * 4, "metadata"),
        ({"a": {**entry(0, 8), "dtype": []}}, b"\0" * 8, "dtype"),
        ({"a\x00b": entry(0, 8)}, b"\0" * 8, "printable"),
        (b'{"a\\ud800": 1}', b"", "printable"),
        ({"a" * 600: entry(0, 8)}, b"\0" * 8, "printable"),
        (b'{"a": 1', b"", "JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[]", b"", "object"),
        (b"[" * 100_000, b"", "JSON"),
    ],
)
def test_a_damaged_file_is_refused_saying_how(tmp_path: Path, header: Any, data: bytes, said: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(MergeyardError, match=said) as caught:
        read_header(path)
    assert caught.value.code == "source_format"


def test_a_header_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(MergeyardError, match="claims"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\1\0\0", b"\xff\0\0\0\0\0\0\0{}"])
def test_a_cut_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(MergeyardError) as caught:
        read_header(path)
    assert caught.value.code == "source_format"
