"""Where artifacts live: a small protocol, and its local folder.

Keys are ``<job>/<attempt token>/<name>``. A file under construction already has its final key: nothing is visible
before the job's row names it, so no rename is needed and local disk and object storage behave alike.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from app.artifacts.disk import Filling, reserve, sync_folder
from app.errors import MergeyardError

KEY_PART = re.compile(r"[\w.+@ -]+")  # one part of a key; "." and ".." are refused beside it
_TRASH = ".trash"
_PIECE = 4 << 20


class StoreWriter(Protocol):
    """A file under construction. ``close`` makes it durable; leaving the ``with`` block by an error aborts."""

    def write(self, data: bytes | memoryview) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Opened(Protocol):
    """A file being read. ``size``: of all of it; ``local``: the same as a file of this machine, where it is one."""

    size: int
    local: BinaryIO | None

    def read(self, count: int) -> bytes: ...
    def close(self) -> None: ...


class ArtifactStore(Protocol):
    """Files by key. A missing key raises FileNotFoundError; a full disk raises OSError with ENOSPC, also one on which
    a file would leave fewer than ``keep_free`` bytes. What cannot be reached raises MergeyardError.
    """

    keep_free: int

    def create(self, key: str, size: int = 0) -> StoreWriter: ...
    def open(self, key: str, offset: int = 0) -> Opened: ...
    def size(self, key: str) -> int: ...
    def sha256(self, key: str, check: Callable[[], None]) -> str: ...
    def keys(self, prefix: str) -> Iterator[str]: ...
    def folders(self) -> Iterator[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_prefix(self, prefix: str, *, keep: Collection[str] = ()) -> None: ...
    def empty_trash(self) -> None: ...
    def free(self) -> int | None: ...
    def scratch(self, prefix: str) -> Path: ...
    def scratched(self) -> Iterator[str]: ...
    def delete_scratch(self, prefix: str) -> None: ...
    def check(self) -> None: ...
    def local_path(self, key: str) -> Path | None: ...
    def signed_url(self, key: str) -> str | None: ...


def read_whole(store: ArtifactStore, key: str) -> bytes:
    """A small file. Raises as ``open``."""
    with closing(store.open(key)) as file:
        return b"".join(iter(lambda: file.read(_PIECE), b""))


class LocalStore:
    """An ArtifactStore in ``folder``, which is made when first written to."""

    def __init__(self, folder: Path, *, keep_free: int = 0) -> None:
        """``keep_free``: bytes of its disk that no file of it takes."""
        self.folder, self.keep_free = folder.absolute(), keep_free

    def create(self, key: str, size: int = 0) -> LocalWriter:
        """A new file of about ``size`` bytes; its space is taken at once, so a full disk shows before the work."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return LocalWriter(path, self.folder, size, self.keep_free)

    def open(self, key: str, offset: int = 0) -> LocalFile:
        """The file, to be read from ``offset`` bytes on."""
        return LocalFile(self.path(key), offset)

    def path(self, key: str) -> Path:
        """The file's place. ValueError for a key that could lead anywhere else."""
        parts = key.split("/")
        if any(part in (".", "..") or not KEY_PART.fullmatch(part) for part in parts) or parts[0] == _TRASH:
            raise ValueError(f"not a store key: {key!r}")
        return self.folder.joinpath(*parts)

    def local_path(self, key: str) -> Path | None:
        """As ``path``: every file is on this machine, or on a disk that it shares."""
        return self.path(key)

    def signed_url(self, key: str) -> str | None:  # noqa: ARG002
        """A folder has no addresses."""
        return None

    def size(self, key: str) -> int:
        """In bytes."""
        return self.path(key).stat().st_size

    def sha256(self, key: str, check: Callable[[], None]) -> str:
        """The hex digest of the bytes as they are now. ``check`` is called after every piece, and may raise."""
        digest, piece = hashlib.sha256(), bytearray(_PIECE)
        with self.path(key).open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(memoryview(piece)[:count])
                check()
        return digest.hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below the folder ``prefix``, in order."""
        for path in sorted(self.path(prefix).rglob("*")):
            if not path.is_dir():
                yield path.relative_to(self.folder).as_posix()

    def folders(self) -> Iterator[str]:
        """The first parts of all keys: the jobs that have files, as they were when this was asked."""
        if not self.folder.is_dir():
            return iter(())
        names = [path.name for path in self.folder.iterdir() if path.name != _TRASH and path.is_dir()]
        return iter(sorted(name for name in names if KEY_PART.fullmatch(name)))

    def delete(self, key: str) -> None:
        """Delete one file; a missing one is deleted already."""
        self.path(key).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Delete the folder ``prefix`` and all below it, but for the keys in ``keep``.

        Without ``keep`` the folder vanishes by one rename, and a crash leaves the rest to ``empty_trash``.
        """
        if any(key.startswith(prefix.rstrip("/") + "/") for key in keep):
            self._thin_out(prefix, set(keep))
            return
        trash = self.folder / _TRASH
        trash.mkdir(parents=True, exist_ok=True)
        try:
            self.path(prefix.rstrip("/")).rename(trash / secrets.token_hex(8))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
        self.empty_trash()

    def empty_trash(self) -> None:
        """Delete what was being deleted, also by a process that died over it."""
        trash = self.folder / _TRASH
        for leftover in trash.iterdir() if trash.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)

    def scratch(self, prefix: str) -> Path:
        """A new folder on this machine, which ``delete_prefix`` deletes with all that is in it."""
        folder = self.path(prefix)
        folder.mkdir(parents=True)
        return folder

    def scratched(self) -> Iterator[str]:
        """The jobs that have scratch on this machine alone: none, it lies beside their files."""
        return iter(())

    def delete_scratch(self, prefix: str) -> None:
        """See ``scratched``."""

    def free(self) -> int | None:
        """Bytes that can still be stored, ``keep_free`` not among them. A store that has no end would answer None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return max(0, shutil.disk_usage(self.folder).free - self.keep_free)

    def check(self) -> None:
        """Raises MergeyardError ``not_ready`` where nothing can be written."""
        check_folder(self.folder, "The artifact store")

    def _thin_out(self, prefix: str, keep: set[str]) -> None:
        for key in list(self.keys(prefix)):
            if key not in keep:
                self.delete(key)
        folders = [path for path in self.path(prefix).rglob("*") if path.is_dir()]
        for folder in sorted(folders, reverse=True):  # the deepest first
            if not any(folder.iterdir()):
                folder.rmdir()


class LocalFile(Opened):
    """A file of the folder, being read."""

    def __init__(self, path: Path, offset: int) -> None:
        self.local = path.open("rb")
        self.local.seek(offset)
        self.size = os.fstat(self.local.fileno()).st_size

    def read(self, count: int) -> bytes:
        return self.local.read(count)

    def close(self) -> None:
        self.local.close()


def check_folder(folder: Path, name: str) -> None:
    """Raises MergeyardError ``not_ready`` where nothing can be written below it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # nameless: no kill can leave it behind
            pass
    except OSError as error:
        raise MergeyardError("not_ready", f"{name} cannot be written to: {error.strerror}.") from None


class LocalWriter:
    """A StoreWriter on a local file."""

    def __init__(self, path: Path, root: Path, size: int, keep_free: int) -> None:
        self._path = path
        self._root = root
        self._written = 0
        self._file = path.open("xb", buffering=0)
        self._filling = Filling(self._file.fileno(), keep_free=keep_free)
        try:
            reserve(self._file.fileno(), size, keep_free=keep_free)
        except OSError:
            self.abort()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        rest = memoryview(data).cast("B")
        while rest:  # a raw file may take less than it is given, at most 2 GiB at once
            taken = self._file.write(rest)
            self._written += taken
            rest = rest[taken:]
        self._filling.reach(self._written)

    def close(self) -> None:
        """The bytes are durable, and so are the folders that name them, when this returns."""
        self._file.truncate(self._written)
        os.fsync(self._file.fileno())
        self._file.close()
        folder = self._path.parent
        while folder != self._root.parent:
            sync_folder(folder)
            folder = folder.parent

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
