"""A bucket of S3-compatible object storage, by ``obstore``: what is asked of one, with failures that have a code.

An object is there when its upload is complete and not before, so what is half-written is never seen. A process that is
killed leaves the parts of an upload that nobody finishes: a rule of the bucket takes them away (docs/deployment.md).
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from queue import Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store

from app.artifacts.store import Opened
from app.errors import MergeyardError
from app.settings import Settings

if TYPE_CHECKING:
    from obstore import GetOptions

PART_BYTES = 16 << 20  # S3 takes 10 000 parts, so files of up to 160 GB
PARTS_AT_ONCE = 4
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 4
WAIT_SECONDS = 0.2
SIGNED_FOR = timedelta(hours=1)  # a download goes on after that; it only has to have begun
TIMEOUT = "120s"  # of one request, all its bytes included: what takes longer is taken up again
RETRY: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}
REFUSED = re.compile(r"returned non-2xx status code: 40[13]\b")  # of a listing obstore raises no class of its own

log = logging.getLogger("mergeyard.bucket")


class Bucket:
    """What is below ``prefix`` of a bucket. Keys are relative to it, and slashes make folders of them.

    A missing key raises FileNotFoundError; anything else is ``code``, whose fault is the system's: ``called`` is the
    subject of its sentence. Safe to share between threads.
    """

    def __init__(self, name: str, prefix: str, *, called: str, code: str, **options: Any) -> None:
        """``options``: of obstore's ``S3Store``."""
        self.url = f"s3://{name}/{prefix}".rstrip("/")
        self._called, self._code = called, code
        self._store = S3Store(name, prefix=prefix or None, retry_config=RETRY, **options)

    @classmethod
    def of(cls, settings: Settings, name: str, prefix: str = "", *, called: str, code: str) -> Bucket:
        """As the operator wants it. What is left empty AWS's own variables say, or the machine it runs on."""
        given = {
            "endpoint": settings.s3_endpoint,
            "region": settings.s3_region,
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": settings.s3_secret_access_key,
        }
        client = {"timeout": TIMEOUT, **({"allow_http": True} if settings.s3_endpoint.startswith("http://") else {})}
        options = {key: value for key, value in given.items() if value}
        return cls(name, prefix, called=called, code=code, client_options=client, **options)

    def writer(self, key: str) -> ObjectWriter:
        """A new object."""
        return ObjectWriter(self._store, key, self._failure)

    def reader(self, key: str, offset: int, size: int, etag: str = "") -> ObjectReader:
        """An object of ``size`` bytes, to be read from ``offset`` on; nothing is asked for before the first ``read``.

        With an ``etag`` it is that version or none: another one raises ``source_changed``.
        """
        return ObjectReader(self._store, key, offset, size, etag, self._failure)

    def size(self, key: str) -> int:
        """In bytes."""
        with self._failures():
            return int(obstore.head(self._store, key)["size"])

    def listed(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """Every object below the folder: its key, its size in bytes, and its ETag."""
        with self._failures():
            for page in obstore.list(self._store, folder):
                for item in page:
                    yield item["path"], item["size"], item["e_tag"] or ""

    def folders(self) -> list[str]:
        """The first parts of all keys."""
        with self._failures():
            found = obstore.list_with_delimiter(self._store)["common_prefixes"]
        return [prefix.rstrip("/") for prefix in found]

    def delete(self, keys: Sequence[str]) -> None:
        """Delete these objects; a missing one is deleted already."""
        if keys:
            with self._failures(), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, list(keys))

    def signed_url(self, key: str) -> str:
        """An address from which anybody can read the object for an hour."""
        with self._failures():
            return obstore.sign(self._store, "GET", key, SIGNED_FOR)

    def check(self) -> None:
        """Raises where the bucket does not answer, or not to us."""
        with self._failures():
            obstore.list_with_delimiter(self._store, "of-nobody")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> MergeyardError:
        """In words that name the bucket, and nothing of its address or of our credentials. The log has the rest."""
        log.warning("%s: %s", self.url, str(error).partition("\n")[0])
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or REFUSED.search(str(error)):
            message = f"{self.url} refuses the service's credentials; its operator must mend them"
        else:
            message = f"{self.url} cannot be used just now"
        return MergeyardError(self._code, f"{self._called} {message}.")


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

    def __init__(self, store: S3Store, key: str, offset: int, size: int, etag: str, failure: Failure) -> None:
        self._store, self._key, self._at, self.size, self._failure = store, key, offset, size, failure
        self._pinned: GetOptions = {"if_match": etag} if etag else {}
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
                    wanted: GetOptions = {"range": (self._at, self.size), **self._pinned}
                    found = obstore.get(self._store, self._key, options=wanted)
                    self._stream = iter(found.stream(min_chunk_size=PIECE_BYTES))
                return bytes(next(self._stream, b""))
            except PreconditionError:
                raise MergeyardError("source_changed", f"{self._key} is another version by now.") from None
            except BaseError as error:
                self._stream = None
                if not again:
                    raise self._failure(error) from error
        raise AssertionError("the second try returns or raises")
