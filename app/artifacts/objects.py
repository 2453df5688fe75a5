"""An artifact store on S3-compatible object storage."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from app.artifacts.bucket import PIECE_BYTES, Bucket, ObjectReader, ObjectWriter
from app.artifacts.store import KEY_PART, LocalStore
from app.settings import Settings


class ObjectStore:
    """An ArtifactStore in a bucket. What is only scratch lies in ``scratch``, a folder of this machine."""

    def __init__(self, bucket: Bucket, scratch: Path, *, keep_free: int = 0) -> None:
        """``keep_free``: bytes of the scratch's disk that nothing takes."""
        self.keep_free = keep_free
        self._bucket = bucket
        self._scratch = LocalStore(scratch, keep_free=keep_free)

    @classmethod
    def of(cls, settings: Settings) -> ObjectStore:
        """As the operator wants it."""
        assert settings.bucket is not None
        name, prefix = settings.bucket
        bucket = Bucket.of(settings, name, prefix, called="The artifact store", code="store_unavailable")
        return cls(bucket, settings.root / "scratch", keep_free=settings.min_free_bytes)

    def create(self, key: str, size: int = 0) -> ObjectWriter:  # noqa: ARG002 — a bucket has no end
        """A new object."""
        return self._bucket.writer(_checked(key))

    def open(self, key: str, offset: int = 0) -> ObjectReader:
        """The object, to be read from ``offset`` bytes on."""
        return self._bucket.reader(_checked(key), offset, self.size(key))

    def size(self, key: str) -> int:
        """In bytes."""
        return self._bucket.size(_checked(key))

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
        return iter(sorted({*self._objects(prefix), *self._scratch.keys(prefix)}))

    def folders(self) -> Iterator[str]:
        """The first parts of all keys: the jobs that have files, as they were when this was asked."""
        named = {name for name in self._bucket.folders() if KEY_PART.fullmatch(name) and not name.startswith(".")}
        return iter(sorted({*named, *self._scratch.folders()}))

    def delete(self, key: str) -> None:
        """Delete one object; a missing one is deleted already."""
        self._scratch.delete(key)
        self._bucket.delete([_checked(key)])

    def delete_prefix(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Delete all below the folder ``prefix``, but for the keys in ``keep``."""
        self.delete_scratch(prefix)
        self._bucket.delete([key for key in self._objects(prefix) if key not in keep])

    def empty_trash(self) -> None:
        """Objects go at once; of the scratch something may be left."""
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
        self._bucket.check()

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002
        """None: nothing of it is on this machine."""
        return None

    def signed_url(self, key: str) -> str:
        """An address from which anybody can read the object for an hour."""
        return self._bucket.signed_url(_checked(key))

    def _objects(self, prefix: str) -> list[str]:
        return [key for key, _, _ in self._bucket.listed(_checked(prefix.rstrip("/")))]


def _checked(key: str) -> str:
    """ValueError for a key that could be another's."""
    if any(part in (".", "..") or not KEY_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"not a store key: {key!r}")
    return key
