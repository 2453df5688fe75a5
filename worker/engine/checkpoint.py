"""Writing a safetensors checkpoint: shards through one writer thread, and the index.

The bytes are a function of the plan and the values alone: tensors lie in the plan's order, each at its final offset,
behind a header padded to eight bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import torch

from app import strict_json
from app.artifacts.manifest import StoredFile, TensorStatistics
from app.planning.output import output_bytes
from app.planning.plan import Plan
from worker.engine.sinks import FileWriter, Sink


def index_of(plan: Plan) -> bytes | None:
    """``model.safetensors.index.json``, or None for a checkpoint of one file."""
    if len(plan.shards) < 2:
        return None
    places = {tensor.name: shard.filename for shard in plan.shards for tensor in shard.tensors}
    index = {
        "metadata": {"total_size": sum(map(output_bytes, plan.tensors))},
        "weight_map": dict(sorted(places.items())),
    }
    return strict_json.file_bytes(index)


def write_file(sink: Sink, filename: str, content: bytes) -> StoredFile:
    """A small file in one go."""
    writer = sink.create(filename, len(content))
    try:
        writer.write(memoryview(content))
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


class Buffers:
    """A fixed number of buffers that blocks' results wait in until they are written: the bound on looking ahead."""

    def __init__(self, count: int, size: int, memory: Callable[[int], torch.Tensor]) -> None:
        """``memory``: the kernels'."""
        self.size = size
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(count):
            self._free.put(memory(size))

    def take(self) -> torch.Tensor:
        """uint8 (size,). Waits for the writer; it gives buffers back even after it failed, so this always ends."""
        return self._free.get()

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.put(buffer)


class ShardWriter:
    """Writes the shards on a thread of its own, so that hashing, writing and syncing overlap with the arithmetic.

    Use as a context manager. Leaving it by an exception aborts the file being written. What fails on the thread is
    raised by the next call, at the latest by ``finish_all``.
    """

    def __init__(self, sink: Sink, buffers: Buffers) -> None:
        self._sink, self._buffers = sink, buffers
        self._steps: SimpleQueue[tuple[Callable[[], None], torch.Tensor | None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="shard-writer", daemon=True)
        self._file: FileWriter | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._stored: list[StoredFile] = []

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._join()
        if self._file is not None:
            self._file.abort()

    def begin(self, filename: str, header: bytes, size: int) -> None:
        """Create a file of ``size`` bytes, the header included."""

        def create() -> None:
            self._file = self._sink.create(filename, size)
            self._file.write(memoryview(header))

        self._submit(create)

    def write(self, buffer: torch.Tensor, size: int) -> None:
        """Append the first ``size`` bytes of a taken buffer, and give it back when they are written."""

        def append() -> None:
            assert self._file is not None
            self._file.write(buffer[:size].numpy().data)

        self._submit(append, buffer)

    def finish(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        """End the file begun last."""

        def finish() -> None:
            assert self._file is not None
            self._sink.remember(filename, statistics)
            stored = self._file.finish()
            self._file = None
            self._stored.append(stored)

        self._submit(finish)

    def finish_all(self) -> Sequence[StoredFile]:
        """Wait until everything is written. The files in the order they were begun."""
        self._join()
        self._raise()
        return self._stored

    def _submit(self, step: Callable[[], None], buffer: torch.Tensor | None = None) -> None:
        self._steps.put((step, buffer))
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        if self._thread.is_alive():
            self._steps.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._steps.get()) is not None:
            step, buffer = item
            if self._error is None and not self._stopping:
                try:
                    step()
                except BaseException as error:  # raised again on the caller's thread
                    self._error = error
            if buffer is not None:
                self._buffers.give_back(buffer)
