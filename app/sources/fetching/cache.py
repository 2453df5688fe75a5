"""What is here of files that are elsewhere, in one folder: headers of weights, and whole files, each by its digest.

A whole file gets its name when all of it is there and has the digest; until then it is ``NAME.part``, which whoever
wants it next takes up where it ends. Several processes may share the folder, which may be deleted whenever nothing is
merged.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from app.artifacts.disk import Filling, check_free
from app.sources.source import RemoteFile

PIECE_BYTES = 1 << 20
MOMENT_NS = 10**18  # the mtime of every file: a commit's files have none, and hosts with caches of their own agree
SHA256_DIGITS = 64


class FetchCache:
    """The folder. ``keep_free``: bytes of its disk that it does not take."""

    def __init__(self, folder: Path, *, keep_free: int = 0) -> None:
        self.folder, self._keep_free = folder, keep_free

    def whole(self, file: RemoteFile) -> Path | None:
        """The file, where all of it is here."""
        path = self.folder / "files" / file.digest
        return path if _is_kept(path, file.size) else None

    def header(self, file: RemoteFile) -> Path | None:
        """The file's safetensors header."""
        path = self.folder / "headers" / file.digest
        return path if path.is_file() else None

    def keep_header(self, file: RemoteFile, header: bytes) -> Path:
        return write_whole(self.folder / "headers" / file.digest, header)

    @contextmanager
    def part(self, file: RemoteFile, wait: Callable[[int], None]) -> Iterator[Part | None]:
        """What is there of the file, to be gone on with; None where it is whole by now.

        Of several processes one writes; the others call ``wait`` (with the bytes that are there) until it is done.
        """
        target = self.folder / "files" / file.digest
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f"{target.name}.part")
        while True:
            with path.open("a+b") as stream:
                while not _locked(stream.fileno()):
                    wait(os.fstat(stream.fileno()).st_size)
                if _is_kept(target, file.size):
                    if _is(path, stream.fileno()):
                        path.unlink()
                    yield None
                    return
                if _is(path, stream.fileno()):  # else it was finished or given up while we waited
                    yield Part(stream, path, target, file, self._keep_free)
                    return


def write_whole(path: Path, content: bytes) -> Path:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(content)
        os.utime(draft, ns=(MOMENT_NS, MOMENT_NS))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


class _Stream(Protocol):
    """A binary file, opened for reading and appending."""

    def fileno(self) -> int: ...
    def read(self, size: int, /) -> bytes: ...
    def write(self, data: bytes, /) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def truncate(self, size: int, /) -> int: ...
    def flush(self) -> None: ...


class Part:
    """A file on its way in, whose lock is held. ``size``: the bytes that are there."""

    def __init__(self, stream: _Stream, path: Path, target: Path, file: RemoteFile, keep_free: int) -> None:
        self._stream, self._path, self._target, self._file, self._keep_free = stream, path, target, file, keep_free
        self.size = 0
        self._begin()
        self._stream.seek(0)
        while piece := self._stream.read(PIECE_BYTES):
            self._digest.update(piece)
            self.size += len(piece)
        if self.size > file.size:
            self.restart()
        # Raises OSError (ENOSPC) before the transfer where the rest has no room.
        check_free(self._stream.fileno(), file.size - self.size, keep_free)

    def write(self, piece: bytes) -> None:
        """Raises OSError (ENOSPC) where the disk is full, or nearly so."""
        self._stream.write(piece)
        self._digest.update(piece)
        self.size += len(piece)
        self._filling.reach(self.size)

    def restart(self) -> None:
        """What is there is of something else."""
        self._stream.truncate(0)
        self._stream.seek(0)
        self.size = 0
        self._begin()

    def finish(self) -> bool:
        """Give the file its name. False, and nothing is kept, where it has another digest."""
        self._stream.flush()
        if not self._file.etag and self._digest.hexdigest() != self._file.digest:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            return False
        os.fsync(self._stream.fileno())
        os.utime(self._path, ns=(MOMENT_NS, MOMENT_NS))
        self._path.replace(self._target)
        return True

    def _begin(self) -> None:
        self._digest = _hash_of(self._file)
        self._filling = Filling(self._stream.fileno(), keep_free=self._keep_free)


def _hash_of(file: RemoteFile) -> Any:
    """What the file's digest is made with: sha256, or git's id of a blob."""
    if len(file.digest) == SHA256_DIGITS:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _is_kept(path: Path, size: int) -> bool:
    """Whether the file is as it was put there."""
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (size, MOMENT_NS)


def _locked(descriptor: int) -> bool:
    """The lock goes with the descriptor, also where its process is killed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
