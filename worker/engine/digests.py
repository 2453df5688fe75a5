"""sha256 of the source files: made by a thread while the merge runs, and remembered between merges."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from app.sources.source import SourceFile
from worker.engine.reader import check_unmoved, moved, open_unmoved, stat_of

_PIECE = 4 << 20
_SLICE_SECONDS = 0.2  # between two checks while the hashing is waited for


class DigestCache:
    """Digests of files as they were, one small file each; several processes may share the folder.

    The key is the header digest, size and mtime that pin a source, and the file's own device, inode and ctime: two
    fine-tunes of one model often share the first three (archives and image layers set every mtime to one instant).
    ``DigestCache(None)`` remembers nothing. A cache that cannot be written only costs time, so it never raises.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, file: SourceFile, status: os.stat_result) -> str | None:
        if self._folder is None:
            return None
        try:
            digest = self._path(self._folder, file, status).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return digest if len(digest) == 64 else None

    def put(self, file: SourceFile, status: os.stat_result, digest: str) -> None:
        """``status`` is from before the file was read: what is written to it later has another ctime."""
        if self._folder is None:
            return
        path = self._path(self._folder, file, status)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(digest + "\n", "ascii")
            draft.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, file: SourceFile, status: os.stat_result) -> Path:
        own = f"{status.st_dev}-{status.st_ino}-{status.st_ctime_ns}"
        return folder / f"{file.header_sha256}-{file.size}-{file.mtime_ns}-{own}"


class SourceDigests:
    """Hashes files on one thread, begun on entering. Leaving by an exception stops it at the next piece."""

    def __init__(self, files: Iterable[SourceFile], cache: DigestCache) -> None:
        self._files, self._cache = list(dict.fromkeys(files)), cache
        self._digests: dict[SourceFile, str] = {}
        self._settled: dict[SourceFile, str] = {}
        self._error: BaseException | None = None
        self._stop = Event()
        self._thread = Thread(target=self._work, name="source-digests", daemon=True)

    def __enter__(self) -> SourceDigests:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def settle(self, planned: SourceFile, digest: str) -> None:
        """What an earlier document made was hashed while it was written."""
        self._settled[planned] = digest

    def check(self) -> None:
        """Raise what went wrong so far, if anything did: ``source_changed`` or ``source_format``."""
        if self._error is not None:
            raise self._error

    def result(self, check: Callable[[], None]) -> dict[SourceFile, str]:
        """Wait for all digests, and for no longer than ``check`` does not raise: large sources take minutes.

        Raises ``source_changed`` where a file is not the planned one any more.
        """
        while self._thread.is_alive():
            self._thread.join(_SLICE_SECONDS)
            check()
        self.check()
        return self._digests | self._settled

    def _work(self) -> None:
        try:
            for file in self._files:
                if self._stop.is_set():
                    return
                self._digests[file] = self._digest(file)
        except BaseException as error:  # raised again on the caller's thread
            self._error = error

    def _digest(self, file: SourceFile) -> str:
        if file.content is not None:
            return file.header_sha256
        status = stat_of(file)
        check_unmoved(file, status)
        remembered = self._cache.get(file, status)
        if remembered is not None:
            return remembered
        digest, status = hash_file(file, self._stop)
        if not self._stop.is_set():
            self._cache.put(file, status, digest)
        return digest


def hash_file(file: SourceFile, stop: Event) -> tuple[str, os.stat_result]:
    """sha256 of the whole file, and the status of what was read, from before it was.

    Raises ``source_changed`` unless it is the planned file before and after.

    For anything but safetensors the plan knows the whole file's digest already, and it must be that one.
    """
    safetensors = file.name.endswith(".safetensors")
    digest = hashlib.sha256()
    piece = bytearray(_PIECE)
    with os.fdopen(open_unmoved(file, with_header=safetensors), "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        while not stop.is_set() and (count := stream.readinto(piece)):
            digest.update(memoryview(piece)[:count])
        check_unmoved(file, os.fstat(stream.fileno()))
    check_unmoved(file, stat_of(file))
    if not stop.is_set() and not safetensors and digest.hexdigest() != file.header_sha256:
        raise moved(file)
    return digest.hexdigest(), status
