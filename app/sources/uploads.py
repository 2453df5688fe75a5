"""Uploads: models and adapters sent over HTTP, checked on arrival, kept by the digest of their contents."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.artifacts.disk import Filling, check_free
from app.errors import MergeyardError
from app.sources.accepted import is_accepted, is_task_file
from app.sources.adapters import CONFIG as ADAPTER_CONFIG
from app.sources.adapters import load_adapter
from app.sources.models import PICKLES, load_model
from app.sources.opening import MAX_SMALL_BYTES
from app.sources.resolver import list_files
from app.sources.stored_uploads import StoredUploads
from app.tasks.reading import check_lines

STAGING = ".staging-"
ABANDONED_SECONDS = 86_400.0
MAX_FILES = 200
CARD = "README.md"  # taken so that whole folders can be sent


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedFile:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A finished upload, by its ``digest`` (sha256 hex). ``kind`` is ``model``, ``adapter`` or ``task``."""

    digest: str
    kind: str
    files: tuple[UploadedFile, ...]

    @property
    def reference(self) -> str:
        return f"upload:sha256-{self.digest}"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class UploadStore:
    """A folder of uploads, each in a folder named by its digest: sha256 over its sorted lines ``sha256  name``."""

    def __init__(self, folder: Path, *, keep_free: int = 0, stored: StoredUploads | None = None) -> None:
        """``keep_free``: bytes of its disk that no upload takes. ``stored``: where uploads are kept for other hosts."""
        self.folder, self._keep_free, self._stored = folder, keep_free, stored

    def begin(self) -> UploadDraft:
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self.folder / f"{STAGING}{secrets.token_hex(8)}"
        staging.mkdir()
        return UploadDraft(self.folder, staging, keep_free=self._keep_free, stored=self._stored)

    def sweep(self, *, abandoned_after: float = ABANDONED_SECONDS) -> None:
        """Remove what uploads left whose process died: nothing was written to it for ``abandoned_after`` seconds.

        Another process may still be receiving any younger one.
        """
        for staging in self.folder.glob(f"{STAGING}*"):
            try:
                newest = max(path.stat().st_mtime for path in (staging, *staging.iterdir()))
            except OSError:  # it was finished or discarded just now
                continue
            if newest < time.time() - abandoned_after:
                shutil.rmtree(staging, ignore_errors=True)


class UploadDraft:
    """Files on their way in. Nothing can be referred to before ``commit``; ``discard`` leaves nothing behind."""

    def __init__(self, folder: Path, staging: Path, *, keep_free: int, stored: StoredUploads | None) -> None:
        self._folder, self._stored = folder, stored
        self._staging = staging
        self._keep_free = keep_free
        self._files: dict[str, UploadedFile] = {}

    def add(self, name: str, chunks: Iterable[bytes]) -> UploadedFile:
        """Store one file.

        Raises:
            MergeyardError: `pickle_refused`, `request_invalid` (a name twice, a path, another kind, too many files),
                `source_format` (too large for what it is).
            OSError: the disk is full (ENOSPC, also where less than what must stay free would be left), or fails.
        """
        if len(self._files) >= MAX_FILES:
            raise MergeyardError(
                "request_invalid", f"The upload has more than {MAX_FILES} files; send fewer, larger ones"
            )
        if name.endswith(PICKLES):
            message = f"{name[-80:]} is a pickle, which can run code when loaded; send safetensors"
            raise MergeyardError("pickle_refused", message, where=name[-80:])
        if name != CARD and not is_accepted(name) and not is_task_file(name):
            taken = "safetensors, config, tokenizer and index files, or one task file (.jsonl) by itself"
            message = f"{name[-80:]!r} is not taken: send plain file names of {taken}"
            raise MergeyardError("request_invalid", message, where=name[-80:])
        if name in self._files:
            raise MergeyardError("request_invalid", f"{name} was sent twice", where=name)
        digest, size = hashlib.sha256(), 0
        with (self._staging / name).open("xb") as stream:
            check_free(stream.fileno(), 0, self._keep_free)
            filling = Filling(stream.fileno(), keep_free=self._keep_free)
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                if size > MAX_SMALL_BYTES and not name.endswith(".safetensors"):
                    raise MergeyardError("source_format", f"{name} is larger than {MAX_SMALL_BYTES} bytes", where=name)
                stream.write(chunk)
                filling.reach(size)
            stream.flush()
            os.fsync(stream.fileno())
        self._files[name] = UploadedFile(name=name, size=size, sha256=digest.hexdigest())
        return self._files[name]

    def check(self) -> Upload:
        """What arrived, as a model or an adapter, with the reference that ``commit`` gives it.

        Raises:
            MergeyardError: `request_invalid` when empty, and whatever `load_model` or `load_adapter` find.
        """
        if not self._files:
            raise MergeyardError("request_invalid", "The upload has no files; send them as multipart form data")
        listing = list_files(self._staging, within=self._staging)
        kind = _kind(listing)
        if kind == "adapter":
            load_adapter(listing, "the upload")
        elif kind == "model":
            load_model(listing, "the upload")
        lines = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(self._files.items()))
        return Upload(
            digest=hashlib.sha256(lines.encode()).hexdigest(),
            kind=kind,
            files=tuple(self._files[name] for name in sorted(self._files)),
        )

    def commit(self, upload: Upload) -> None:
        """Put what ``check`` found in its place. Raises ``store_unavailable``."""
        if self._stored is not None:
            self._stored.keep(upload, self._staging)
        target = self._folder / upload.digest
        try:
            self._staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            self.discard()  # the same bytes are there already

    def discard(self) -> None:
        """Remove the staged files; safe to call at any time."""
        shutil.rmtree(self._staging, ignore_errors=True)


def _kind(listing: Mapping[str, Path]) -> str:
    """What the files are. Raises ``request_invalid`` where a task file is not alone, ``task_invalid``."""
    tasks = [name for name in listing if is_task_file(name)]
    if not tasks:
        return "adapter" if ADAPTER_CONFIG in listing else "model"
    if len(tasks) > 1 or any(name != CARD for name in listing if name not in tasks):
        raise MergeyardError("request_invalid", "A task file is uploaded by itself: send one .jsonl file")
    check_lines(listing[tasks[0]].read_bytes(), name=tasks[0])
    return "task"
