"""Where a merge's files go: the Sink protocol the engine writes to, and the sink of a local folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from app.artifacts.disk import Filling, reserve, sync_folder
from app.artifacts.manifest import StoredFile, TensorStatistics
from app.errors import MergeyardError

SCRATCH = ".earlier"  # what earlier documents make, beside an attempt's own files


class FileWriter(Protocol):
    """One file on its way. Either ``finish`` or ``abort`` is called, once, and nothing after it."""

    def write(self, data: memoryview) -> None:
        """Append bytes. The buffer is used again by the caller as soon as this returns."""
        ...

    def finish(self) -> StoredFile:
        """Make the file durable and name it, with the digest made while writing."""
        ...

    def abort(self) -> None:
        """Forget the file; nothing of it stays. Never raises."""
        ...


class Sink(Protocol):
    """Takes the files of one merge. Calls never overlap, but come from two threads: ``create``, ``remember`` and the
    FileWriter's from the engine's writer, ``adopt`` and ``recall`` (before any file is created) from the caller's.

    An OSError that means "no space" may pass through; the engine turns it into ``disk_full``. ``keep_free``: bytes of
    the disk of ``scratch`` that nothing in there takes.
    """

    keep_free: int

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:
        """The weight file an earlier attempt finished, if its digest still holds; else None and it is made anew.

        ``check`` is called every so often while the file is read, and what it raises passes through.
        """
        ...

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:
        """What ``remember`` was told of a file by an earlier attempt; None makes the engine merge it again."""
        ...

    def create(self, filename: str, size: int) -> FileWriter:
        """Begin a file of exactly ``size`` bytes."""
        ...

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        """Keep the statistics of a weight file, so that a retry may adopt it. Called just before its ``finish``."""
        ...

    def readable(self, files: Sequence[StoredFile]) -> AbstractContextManager[Path]:
        """A folder on this machine in which these finished files lie under their names; it may hold others."""
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """An empty folder on this machine for what earlier documents make: no part of the result, gone on leaving."""
        ...


def statistics_as_json(statistics: Mapping[str, TensorStatistics]) -> dict[str, Any]:
    """JSON-ready form of what ``remember`` is given; ``statistics_from_json`` turns it back, bit for bit."""
    return {
        name: {
            "sources": list(value.sources),
            "trimmed": list(value.trimmed),
            "sign_conflict": value.sign_conflict,
            "source_norms": list(value.source_norms),
            "merged_norm": value.merged_norm,
            "parameters": value.parameters,
            "retained_energy": value.retained_energy,
        }
        for name, value in statistics.items()
    }


def statistics_from_json(value: Mapping[str, Any]) -> dict[str, TensorStatistics]:
    """The inverse of ``statistics_as_json``. Raises KeyError or TypeError where the value is something else."""
    return {
        name: TensorStatistics(
            sources=tuple(entry["sources"]),
            trimmed=tuple(entry["trimmed"]),
            sign_conflict=entry["sign_conflict"],
            source_norms=tuple(entry["source_norms"]),
            merged_norm=entry["merged_norm"],
            parameters=entry["parameters"],
            retained_energy=entry["retained_energy"],
        )
        for name, entry in value.items()
    }


class AttemptFolder:
    """A Sink into a folder that holds one attempt, so that there is nothing to adopt."""

    keep_free = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:  # noqa: ARG002
        return None

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:  # noqa: ARG002
        return None

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        pass

    def create(self, filename: str, size: int) -> LocalFile:
        return LocalFile(self._folder / filename, name=filename, size=size)

    @contextlib.contextmanager
    def readable(self, files: Sequence[StoredFile]) -> Iterator[Path]:  # noqa: ARG002 — they lie there already
        yield self._folder

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = self._folder / SCRATCH
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class ScratchFolder(AttemptFolder):
    """What earlier documents make: read back at once, and gone with the attempt. Nothing waits for the disk."""

    def __init__(self, folder: Path, *, keep_free: int = 0) -> None:
        super().__init__(folder)
        self.keep_free = keep_free

    def create(self, filename: str, size: int) -> LocalFile:
        return LocalFile(self._folder / filename, name=filename, size=size, lasting=False, keep_free=self.keep_free)


class FolderSink(AttemptFolder):
    """Writes into a hidden folder beside ``out`` which becomes ``out`` in one rename: nothing half-written is visible.

    Use as a context manager: leaving it without ``publish`` (or by an exception) removes everything.
    Raises ``output_exists`` where ``out`` is there already and is not an empty folder, and OSError (ENOSPC) on entering
    where its disk has fewer than ``needs`` bytes free.
    """

    def __init__(self, out: Path, *, needs: int = 0) -> None:
        self.out, self._needs = out.absolute(), needs
        self._refuse_existing()
        super().__init__(self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}.part")
        self._made: list[Path] = []

    def __enter__(self) -> FolderSink:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        if _free_bytes(self.out.parents[len(missing)]) < self._needs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._made = missing
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        """After ``publish`` there is nothing left to remove."""
        if self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)
            for parent in self._made:
                with contextlib.suppress(OSError):  # somebody else may use it by now
                    parent.rmdir()

    def publish(self) -> None:
        """Make the folder visible under its name. The rename replaces an empty folder and refuses any other."""
        sync_folder(self._folder)
        try:
            self._folder.rename(self.out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise self._exists() from error
            raise
        sync_folder(self.out.parent)

    def _refuse_existing(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise self._exists()
        if self.out.is_dir() and any(self.out.iterdir()):
            raise self._exists()

    def _exists(self) -> MergeyardError:
        return MergeyardError(
            "output_exists",
            f"{self.out} already exists and is not an empty folder; remove it or name another.",
        )


class LocalFile:
    """A file of ``size`` bytes, hashed while it is written. Space is reserved first, so a full disk shows at once.

    ``lasting``: a power cut takes none of it once it is finished. ``keep_free``: bytes of its disk that it leaves free.
    """

    def __init__(self, path: Path, *, name: str, size: int, lasting: bool = True, keep_free: int = 0) -> None:
        self._path, self._name, self._size, self._lasting = path, name, size, lasting
        self._written = 0
        self._digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._filling = Filling(self._descriptor, lasting=lasting, keep_free=keep_free)
        try:
            reserve(self._descriptor, size, keep_free=keep_free)
        except OSError:
            self.abort()
            raise

    def write(self, data: memoryview) -> None:
        self._digest.update(data)
        for part in _written(self._descriptor, data):
            self._written += part
        self._filling.reach(self._written)

    def finish(self) -> StoredFile:
        if self._written != self._size:
            raise ValueError(f"{self._name}: {self._written} bytes written, {self._size} announced")
        if self._lasting:
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        return StoredFile(name=self._name, key=self._name, size=self._size, sha256=self._digest.hexdigest())

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._path.unlink(missing_ok=True)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _written(descriptor: int, data: memoryview) -> Iterator[int]:
    """Write all of ``data``, yielding the size of each part: a write may take less than it is given."""
    rest = data.cast("B")
    while len(rest):
        count = os.write(descriptor, rest)
        rest = rest[count:]
        yield count
