"""A model in memory that becomes one merge after the other: the engine's Sink whose files are a loaded model's tensors.

No checkpoint is written: the bytes that would go into a safetensors file go into the parameters, tensor by tensor, and
nothing else of a merge is kept. So a point of a sweep costs what its arithmetic costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.artifacts.manifest import StoredFile, TensorStatistics
from app.errors import MergeyardError
from app.planning.plan import Plan, document_bytes
from worker.engine.digests import DigestCache
from worker.engine.kernels.signature import Kernels
from worker.engine.meter import Control
from worker.engine.reader import DTYPES
from worker.engine.run import run_merge
from worker.engine.sinks import FileWriter
from worker.evaluation.loading import Loaded, empty_model


class ModelInMemory:
    """The model that plans of one shape make: the same tensors, types and config, whatever their parameters."""

    def __init__(self, plan: Plan, folder: Path, device: str) -> None:
        """``folder`` (empty) takes the small files that the model's class and its tokenizer are made from.

        Raises MergeyardError as ``loaded`` does, and ``not_supported`` where the checkpoint's tensors are not the
        model's by name and shape: then it can only be scored as a checkpoint.
        """
        for name, document in plan.documents.items():
            (folder / name).write_bytes(document_bytes(document))
        for file in plan.companions:
            content = file.path.read_bytes() if file.content is None else file.content
            (folder / file.name).write_bytes(content)
        self.loaded: Loaded = empty_model(folder, device)
        self._shape = _shape_of(plan)
        self._places = _places(plan, self.loaded.model)

    def become(self, plan: Plan, *, kernels: Kernels, control: Control, digests: DigestCache, threads: int = 0) -> None:
        """Merge into the parameters. Raises what ``run_merge`` raises; the model is undefined then, until the next."""
        if _shape_of(plan) != self._shape:
            message = "This point's tensors or types are not those of the others; sweep it by itself."
            raise MergeyardError("not_supported", message)
        run_merge(plan, MemorySink(self._places), kernels=kernels, threads=threads, control=control, digests=digests)


class MemorySink:
    """A Sink of one merge, into ``places``: tensors by the names they have in a checkpoint."""

    keep_free = 0

    def __init__(self, places: Mapping[str, torch.Tensor]) -> None:
        self._places = places

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:  # noqa: ARG002
        return None

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:  # noqa: ARG002
        return None

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        pass

    def create(self, filename: str, size: int) -> FileWriter:
        return _Weights(filename, size, self._places) if filename.endswith(".safetensors") else _Nowhere(filename, size)

    @contextlib.contextmanager
    def readable(self, files: Sequence[StoredFile]) -> Iterator[Path]:  # noqa: ARG002
        raise AssertionError("a merge into memory is scored where it is")
        yield Path()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        message = "A recipe that makes other models on its way cannot be merged into memory; merge those first."
        raise MergeyardError("not_supported", message)
        yield Path()


class _Nowhere:
    """A small file that nobody reads; the engine compares the digests of those that it copies."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._digest = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        self._digest.update(data)

    def finish(self) -> StoredFile:
        return StoredFile(name=self._name, key="", size=self._size, sha256=self._digest.hexdigest())

    def abort(self) -> None:
        pass


@dataclass(slots=True)
class _Entry:
    """A tensor's bytes in the file, from ``begin`` up to ``end``, and where they go: ``into``, bytes in a row."""

    begin: int
    end: int
    into: torch.Tensor
    settle: Callable[[], None]


class _Weights(_Nowhere):
    """A safetensors file on its way: its header says where the tensors lie, and each goes to its place."""

    def __init__(self, name: str, size: int, places: Mapping[str, torch.Tensor]) -> None:
        super().__init__(name, size)
        self._places = places
        self._header = bytearray()
        self._entries: list[_Entry] | None = None
        self._at = 0

    def write(self, data: memoryview) -> None:
        rest = data.cast("B")
        if self._entries is None:
            rest = self._read_header(rest)
        while rest.nbytes:
            assert self._entries, "more bytes than the header has tensors"
            entry = self._entries[0]
            count = min(rest.nbytes, entry.end - self._at)
            start = self._at - entry.begin
            entry.into[start : start + count].copy_(torch.frombuffer(rest[:count], dtype=torch.uint8))
            self._at += count
            rest = rest[count:]
            if self._at == entry.end:
                entry.settle()
                del self._entries[0]

    def _read_header(self, data: memoryview) -> memoryview:
        """What follows the header; nothing while it is not complete."""
        known = len(self._header)
        self._header += data[: self._missing(known)]
        taken = len(self._header) - known
        if self._missing(len(self._header)):  # its length was not known before
            more = data[taken : taken + self._missing(len(self._header))]
            self._header += more
            taken += len(more)
        if not self._missing(len(self._header)):
            header = json.loads(self._header[8:])
            header.pop("__metadata__", None)
            found = [
                self._entry(name, item)
                for name, item in header.items()
                if item["data_offsets"][0] < item["data_offsets"][1]
            ]
            self._entries = sorted(found, key=lambda entry: entry.begin)
        return data[taken:]

    def _missing(self, known: int) -> int:
        if known < 8:
            return 8 - known
        return 8 + int.from_bytes(self._header[:8], "little") - known

    def _entry(self, name: str, item: Mapping[str, Any]) -> _Entry:
        begin, end = item["data_offsets"]
        place, dtype = self._places[name], DTYPES[item["dtype"]]
        if place.dtype == dtype and place.is_contiguous() and place.device.type == "cpu":
            return _Entry(begin, end, _bytes_of(place), lambda: None)
        staged = torch.empty(place.shape, dtype=dtype)
        return _Entry(begin, end, _bytes_of(staged), lambda: _copy(place, staged))


def _copy(place: torch.Tensor, staged: torch.Tensor) -> None:
    place.copy_(staged)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _shape_of(plan: Plan) -> tuple[Any, ...]:
    return tuple((tensor.name, tensor.shape, tensor.dtype) for tensor in plan.tensors)


def _places(plan: Plan, model: Any) -> dict[str, torch.Tensor]:
    """Where each tensor of the checkpoint lies in the model. Some checkpoints lack the model's own prefix."""
    own: dict[str, torch.Tensor] = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    places = {}
    for tensor in plan.tensors:
        name = next((name for name in (tensor.name, prefix + tensor.name) if name in own), None)
        if name is None or tuple(own[name].shape) != tensor.shape:
            raise _unlike(tensor.name)
        places[tensor.name] = own[name]
    filled = {place.data_ptr() for place in places.values()}
    if left := [name for name, tensor in own.items() if tensor.numel() and tensor.data_ptr() not in filled]:
        raise _unlike(left[0])
    return places


def _unlike(name: str) -> MergeyardError:
    message = (
        f"The checkpoint and the loaded model do not have the same tensors ({name}): transformers renames or joins "
        "them when it loads this kind of model, which a sweep cannot follow. Score its checkpoints one by one."
    )
    return MergeyardError("not_supported", message)
