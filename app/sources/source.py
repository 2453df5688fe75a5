"""What a reference resolves to: files on this machine, their tensors, and what an adapter's config says of them.

Everything here is read from headers and configs; no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file and what pins it: a file whose size, mtime or header differs later is another file.

    ``name`` is what the file is called inside its model; ``path`` leads to its bytes and may be called anything, as in
    a hub cache, where names are links to blobs. ``header_sha256`` is that of a safetensors header (length prefix
    and JSON), or of the whole file for others.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's place in a file: safetensors ``dtype`` (``BF16``), ``shape``, absolute ``offset`` and ``nbytes``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A full model: every tensor by name, ``config.json``, and the files that travel with it untouched."""

    reference: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]  # the weight shards, in the index's order
    companions: tuple[SourceFile, ...]  # config, generation config, tokenizer, chat template


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """The factors of one adapted module: A (r, in), B (out, r), ΔW = scale · B·A in float32."""

    module: str
    A: TensorSpec
    B: TensorSpec
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """A PEFT adapter: its LoRA modules, and the tensors ``modules_to_save`` replaced outright.

    Module names are the adapter's own, with PEFT's wrapping prefixes stripped.
    """

    reference: str
    config: Mapping[str, Any]
    modules: tuple[LoraModule, ...]
    saved: Mapping[str, TensorSpec]
    fan_in_fan_out: bool
    files: tuple[SourceFile, ...]


Source = ModelSource | AdapterSource
