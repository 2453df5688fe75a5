"""An artifact store on S3-compatible object storage, by ``obstore``.

An object is there when its upload is complete and not before, so what is half-written is never seen. A process that is
killed leaves the parts of an upload that nobody finishes: a rule of the bucket takes them away (docs/deployment.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from queue import Full, Queue
from types import TracebackType
from typing import Any, BinaryIO, Self

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from app.artifacts.store import KEY_PART, LocalStore, Opened
from app.errors import MergeyardError
from app.settings import Settings

PART_BYTES = 16 << 20  # S3 takes 10 000 parts, so files of up to 160 GB
PARTS_AT_ONCE = 4
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 4
REFUSED = re.compile(r"returned non-2xx status code: 40[13]\b")  # of a listing obstore raises no class of its own
RETRY: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}
SIGNED_FOR = timedelta(hours=1)  # a download goes on after that; it only has to have begun
WAIT_SECONDS = 0.2


log = logging.getLogger("mergeyard.store")


class ObjectStore:
    """An ArtifactStore below ``prefix`` of a bucket. What is only scratch lies in ``scratch``, a local folder."""

    def __init__(self, bucket: str, prefix: str, scratch: Path, *, keep_free: int = 0, **options: Any) -> None:
        """``keep_free``: bytes of the scratch's disk that nothing takes. ``options``: of ``S3Store``."""
        self.name = f"s3://{bucket}/{prefix}".rstrip("/")
        self.keep_free = keep_free
        self._store = S3Store(bucket, prefix=prefix or None, retry_config=RETRY, **options)
        self._scratch = LocalStore(scratch, keep_free=keep_free)

    @classmethod
    def of(cls, settings: Settings) -> ObjectStore:
        """As the operator wants it. What is left empty AWS's own variables say, or the machine it runs on."""
        assert settings.bucket is not None
        bucket, prefix = settings.bucket
        given = {
            "endpoint": settings.s3_endpoint,
            "region": settings.s3_region,
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": settings.s3_secret_access_key,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value}
        if settings.s3_endpoint.startswith("http://"):
            options["client_options"] = {"allow_http": True}
        return cls(bucket, prefix, settings.root / "scratch", keep_free=settings.min_free_bytes, **options)

    def create(self, key: str, size: int = 0) -> ObjectWriter:  # noqa: ARG002 — a bucket has no end
        """A new object."""
        return ObjectWriter(self._store, _checked(key), self._failure)

    def open(self, key: str, offset: int = 0) -> ObjectReader:
        """The object, to be read from ``offset`` bytes on; nothing is asked for before the first ``read``."""
        return ObjectReader(self._store, key, offset, self.size(key), self._failure)

    def size(self, key: str) -> int:
        """In bytes."""
        with self._failures():
            return int(obstore.head(self._store, _checked(key))["size"])

    def sha256(self, key: str, check: Callable[[], None]) -> str:
        """The hex digest of the bytes as they are now. ``check`` is called after every piece, and may raise."""
        digest = hashlib.sha256()
        with contextlib.closing(self.open(key)) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                check()
        return digest.hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below the folder ``prefix``, in order; of what is only scratch here, too."""
        yield from sorted({*self._objects(prefix), *self._scratch.keys(prefix)})

    def folders(self) -> Iterator[str]:
        """The first parts of all keys: the jobs that have files, as they were when this was asked."""
        with self._failures():
            found = obstore.list_with_delimiter(self._store)["common_prefixes"]
        named = {prefix.rstrip("/") for prefix in found}
        return iter(sorted({*(name for name in named if KEY_PART.fullmatch(name)), *self._scratch.folders()}))

    def delete(self, key: str) -> None:
        """Delete one object; a missing one is deleted already."""
        self._scratch.delete(key)
        self._delete([_checked(key)])

    def delete_prefix(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Delete all below the folder ``prefix``, but for the keys in ``keep``."""
        self.delete_scratch(prefix)
        self._delete([key for key in self._objects(prefix) if key not in keep])

    def empty_trash(self) -> None:
        """There is none: objects go at once."""
        self._scratch.empty_trash()

    def free(self) -> int | None:
        """No end is known of."""
        return None

    def scratch(self, prefix: str) -> Path:
        """A new folder on this machine, which ``delete_prefix`` deletes with all that is in it."""
        return self._scratch.scratch(prefix)

    def scratched(self) -> Iterator[str]:
        """The jobs that have scratch on this machine."""
        return self._scratch.folders()

    def delete_scratch(self, prefix: str) -> None:
        """Delete what is only scratch here, and the folders that are empty then."""
        self._scratch.delete_prefix(prefix)
        with contextlib.suppress(OSError):  # something else is in there
            for folder in self._scratch.path(prefix).parents:
                if folder == self._scratch.folder:
                    break
                folder.rmdir()

    def check(self) -> None:
        """Raises MergeyardError ``store_unavailable`` where the bucket does not answer, or not to us."""
        with self._failures():
            obstore.list_with_delimiter(self._store, "of-nobody")

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002
        """None: nothing of it is on this machine."""
        return None

    def signed_url(self, key: str) -> str:
        """An address from which anybody can read the object for an hour."""
        with self._failures():
            return obstore.sign(self._store, "GET", _checked(key), SIGNED_FOR)

    def _objects(self, prefix: str) -> list[str]:
        with self._failures():
            pages = obstore.list(self._store, _checked(prefix.rstrip("/")))
            return [item["path"] for page in pages for item in page]

    def _delete(self, keys: list[str]) -> None:
        if keys:
            with self._failures(), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, keys)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> MergeyardError:
        """In words that name the store, and nothing of its address or of our credentials. The log has the rest."""
        log.warning("%s: %s", self.name, str(error).partition("\n")[0])
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or REFUSED.search(str(error)):
            message = f"{self.name} refuses the service's credentials; its operator must mend them"
        else:
            message = f"{self.name} cannot be used just now"
        return MergeyardError("store_unavailable", f"The artifact store {message}.")


Failure = Callable[[Exception], MergeyardError]


class ObjectWriter:
    """A StoreWriter: parts are uploaded, several at once, while the next ones come. Any failure aborts the upload."""

    def __init__(self, store: S3Store, key: str, failure: Failure) -> None:
        self._store, self._key, self._failure = store, key, failure
        self._pieces: Queue[bytes | _Abort | None] = Queue(PIECES_AHEAD)
        self._raised: BaseException | None = None
        self._uploading = threading.Thread(target=self._upload, name="upload", daemon=True)
        self._uploading.start()

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``, which is copied: obstore reads it later."""
        rest = memoryview(data).cast("B")
        for start in range(0, rest.nbytes, PIECE_BYTES):
            self._give(bytes(rest[start : start + PIECE_BYTES]))

    def close(self) -> None:
        """The object is there, and durable, when this returns."""
        self._give(None)
        self._uploading.join()
        self._raise()

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._uploading.is_alive():
            with contextlib.suppress(MergeyardError):
                self._give(_Abort())
            self._uploading.join()

    def _give(self, piece: bytes | _Abort | None) -> None:
        while True:
            if not self._uploading.is_alive():
                self._raise()
                raise AssertionError("an upload was written to after its end")
            try:
                self._pieces.put(piece, timeout=WAIT_SECONDS)
            except Full:
                continue
            return

    def _upload(self) -> None:
        try:
            obstore.put(
                self._store,
                self._key,
                self._taken(),
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
        except BaseException as error:  # told to whoever writes; an abort is told to nobody
            self._raised = error

    def _taken(self) -> Iterator[bytes]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, _Abort):
                raise piece
            yield piece

    def _raise(self) -> None:
        if isinstance(self._raised, BaseError | FileNotFoundError):  # what is not found is the bucket
            raise self._failure(self._raised) from self._raised
        if self._raised is not None:
            raise self._raised

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class _Abort(Exception):  # noqa: N818 — what makes obstore abort the upload
    pass


class ObjectReader(Opened):
    """An object of ``size`` bytes from ``offset`` on. What breaks on the way is taken up where it broke, once."""

    local: BinaryIO | None = None

    def __init__(self, store: S3Store, key: str, offset: int, size: int, failure: Failure) -> None:
        self._store, self._key, self._at, self.size, self._failure = store, _checked(key), offset, size, failure
        self._stream: Iterator[Any] | None = None
        self._rest = memoryview(b"")

    def read(self, count: int) -> bytes:
        """The next bytes, at most ``count``; none at the end."""
        if not self._rest.nbytes and self._at < self.size:
            self._rest = memoryview(self._next())
        taken = bytes(self._rest[:count])
        self._rest = self._rest[count:]
        self._at += len(taken)
        return taken

    def close(self) -> None:
        """End the request, if there is one."""
        self._stream, self._rest = None, memoryview(b"")

    def _next(self) -> bytes:
        for again in (True, False):
            try:
                if self._stream is None:
                    found = obstore.get(self._store, self._key, options={"range": (self._at, self.size)})
                    self._stream = iter(found.stream(min_chunk_size=PIECE_BYTES))
                return bytes(next(self._stream, b""))
            except BaseError as error:
                self._stream = None
                if not again:
                    raise self._failure(error) from error
        raise AssertionError("the second try returns or raises")


def _checked(key: str) -> str:
    """ValueError for a key that could be another's."""
    if any(part in (".", "..") or not KEY_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"not a store key: {key!r}")
    return key
