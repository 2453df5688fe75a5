"""A folder of files → ModelSource: single-file and sharded checkpoints in safetensors, and what travels with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app import strict_json
from app.errors import MergeyardError
from app.sources.opening import read_small
from app.sources.safetensors import FLOATS, read_header
from app.sources.source import ModelSource, RemoteFile, SourceFile, TensorSpec

MAX_TENSORS = 500_000  # of one model, in all its files; each takes about a kilobyte of memory
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files that belong to a model and are data: never code, never weights.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "config_sentence_transformers.json", "modules.json", "LICENSE", "NOTICE",
)  # fmt: skip


def load_model(
    files: Mapping[str, Path], reference: str, remote: Mapping[str, RemoteFile] = MappingProxyType({})
) -> ModelSource:
    """Read a model's headers and configs. ``files`` maps names inside the model to real paths.

    ``remote``: those of which only the header is here.

    Raises:
        MergeyardError: `source_not_found` (no weights, no config, a missing shard), `pickle_refused`,
            `source_format`, `model_quantized` (also packed weights); an adapter folder is `reference_invalid`.
    """
    if "adapter_config.json" in files and "config.json" not in files:
        raise MergeyardError(
            "reference_invalid", f"{reference} is an adapter; name it under `adapter:` or as base+adapter"
        )
    if "config.json" not in files:
        raise MergeyardError("source_not_found", f"{reference} has no config.json; it is not a model folder")
    config = read_json(files["config.json"], reference)
    if config.get("quantization_config"):
        message = f"{reference} is quantised; merge into the unquantised weights and quantise the result"
        raise MergeyardError("model_quantized", message)
    tensors: dict[str, TensorSpec] = {}
    shards = []
    names, indexed = _shards(files, reference)
    for name in names:
        header = read_header(files[name], name, remote.get(name))
        shards.append(header.file)
        for tensor in header.tensors.values():
            if tensor.name in tensors:
                raise MergeyardError("source_format", f"{reference} holds the tensor {tensor.name} twice")
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise MergeyardError("source_format", f"{reference} holds more than {MAX_TENSORS} tensors")
    if not tensors:
        raise MergeyardError("source_format", f"{reference} holds no tensors")
    lost = [name for name in indexed if name not in tensors]
    if lost:
        raise MergeyardError("source_format", f"{INDEX} of {reference} names {lost[0][:80]}, which is in no shard")
    _refuse_packed(tensors.values(), reference)
    return ModelSource(
        reference=reference,
        tensors=tensors,
        config=config,
        files=tuple(shards),
        companions=companions_of(files),
    )


def companions_of(files: Mapping[str, Path]) -> tuple[SourceFile, ...]:
    """The files that travel with a model, each pinned. Raises MergeyardError `source_not_found`, `source_format`."""
    return tuple(pin(files[name], name) for name in COMPANIONS if name in files)


def pin(path: Path, name: str) -> SourceFile:
    """A small file as a SourceFile: its whole digest is its pin.

    Raises MergeyardError `source_not_found`, `source_format` (too large).
    """
    try:
        content, status = read_small(path)
    except OSError as error:
        raise MergeyardError("source_not_found", f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise MergeyardError("source_format", f"{name} is {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    return SourceFile(name=name, path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, header_sha256=digest)


def read_document(file: SourceFile, reference: str) -> dict[str, Any]:
    """A JSON object from a file that may be another document's yet. Raises as ``read_json`` does."""
    return _object(read_value(file, reference), file.name, reference)


def read_value(file: SourceFile, reference: str) -> Any:
    """Any JSON value, as ``read_document``."""
    return _value(_content(file.path, reference) if file.content is None else file.content, file.name, reference)


def read_json(path: Path, reference: str) -> dict[str, Any]:
    """A JSON object from a source's file. Raises MergeyardError `source_format`, `source_not_found`."""
    return _object(_value(_content(path, reference), path.name, reference), path.name, reference)


def _content(path: Path, reference: str) -> bytes:
    try:
        return read_small(path)[0]
    except OSError as error:
        message = f"{path.name} of {reference} cannot be read: {error.strerror}"
        raise MergeyardError("source_not_found", message) from None
    except ValueError as error:
        raise MergeyardError("source_format", f"{path.name} of {reference} is {error}") from None


def _value(content: bytes, name: str, reference: str) -> Any:
    try:
        return strict_json.loads_document(content)
    except ValueError as error:
        raise MergeyardError("source_format", f"{name} of {reference} is not valid JSON: {error}") from None


def _object(value: Any, name: str, reference: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MergeyardError("source_format", f"{name} of {reference} is not a JSON object")
    return value


def _refuse_packed(tensors: Iterable[TensorSpec], reference: str) -> None:
    """Whole numbers are copied, as buffers should be; weights stored so (or in 8 bits) would be lost in silence."""
    for tensor in tensors:
        packed = tensor.dtype not in FLOATS and len(tensor.shape) > 1 and tensor.name.endswith("weight")
        if packed or tensor.dtype.startswith("F8"):
            message = f"{reference} stores {tensor.name} as {tensor.dtype}; merge into weights of 16 bits or more"
            raise MergeyardError("model_quantized", message)


def _shards(files: Mapping[str, Path], reference: str) -> tuple[list[str], Iterable[str]]:
    """The weight files' names, in the index's order (or the single file), and the tensors the index names."""
    if INDEX in files:
        weight_map = read_json(files[INDEX], reference).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise MergeyardError("source_format", f"{INDEX} of {reference} has no weight_map")
        names = list(dict.fromkeys(weight_map.values()))
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise _pickled(pickles[0], reference)
        missing = [name for name in names if name not in files]
        if missing:
            raise MergeyardError("source_not_found", f"{reference} lacks its shard {missing[0][:200]}")
        return names, weight_map
    if "model.safetensors" in files:
        return ["model.safetensors"], ()
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise _pickled(pickles[0], reference)
    raise MergeyardError("source_not_found", f"{reference} has no model.safetensors and no {INDEX}")


def _pickled(name: str, reference: str) -> MergeyardError:
    message = (
        f"{reference} has only pickled weights ({name[-80:]}), which can run code when loaded; convert them to "
        "safetensors"
    )
    return MergeyardError("pickle_refused", message)
