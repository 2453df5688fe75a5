"""``s3://BUCKET/PATH`` → files: pinned to the versions that are there, headers first, whole when they are merged."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from app.errors import MergeyardError
from app.settings import Settings
from app.sources.accepted import is_accepted
from app.sources.fetching.cache import PIECE_BYTES, FetchCache
from app.sources.fetching.fetching import WEIGHTS, Fetching
from app.sources.fetching.transfer import Transfer, start_by_opening
from app.sources.models import PICKLES
from app.sources.opening import MAX_SMALL_BYTES
from app.sources.references import BUCKET_PATH, Reference
from app.sources.source import FoundFiles, RemoteFile

if TYPE_CHECKING:
    from app.artifacts.bucket import Bucket

MAX_OBJECTS = 10_000  # in one folder


@dataclass(frozen=True, slots=True)
class Buckets:
    """``allowed``: what may be named, as ``s3://BUCKET/PREFIX``; None: anything (local commands)."""

    settings: Settings
    allowed: tuple[str, ...] | None

    @classmethod
    def of(cls, settings: Settings) -> Buckets:
        """As the service's operator wants it."""
        parts = (part.strip().rstrip("/") for part in settings.s3_sources.split(","))
        return cls(settings, tuple(part for part in parts if part))

    def files(self, name: str) -> tuple[Reference, FoundFiles]:
        """The folder's files, and the reference that names these versions of them (``name`` is what follows ``s3:``).

        Raises:
            MergeyardError: `bucket_not_allowed`, `source_not_found`, `source_changed` (another version was pinned),
                `source_too_large`, `source_format`, `bucket_unavailable`, `disk_full`.
        """
        found = BUCKET_PATH.fullmatch(name)
        assert found is not None
        bucket, path = found["bucket"], found["path"]
        place = f"s3://{bucket}/{path}"
        self._check_allowed(place)
        every = self._listed(bucket, path, place)
        listed = [file for file in every if is_accepted(file[0])]
        revision = _revision(listed)
        if found["revision"] not in (None, revision):
            message = f"{place} is not what it was: its files are not the versions of @{found['revision'][:12]}"
            raise MergeyardError("source_changed", message)
        files = [_remote(place, path, revision, *item) for item in listed]
        for file in files:
            if file.size > MAX_SMALL_BYTES and not file.name.endswith(WEIGHTS):
                message = f"{file.name} of {place} has {file.size} bytes; at most {MAX_SMALL_BYTES} are taken"
                raise MergeyardError("source_too_large", message)
        if (size := sum(file.size for file in files)) > self.settings.hub_max_bytes:
            message = f"{place} has {size} bytes; at most {self.settings.hub_max_bytes} are fetched"
            raise MergeyardError("source_too_large", message)
        begun = self._fetching(bucket).begun(files)
        # Names alone: what is pickled is refused by name, as in any folder, and never fetched.
        pickles = {name: self.settings.hub_files for name, _, _ in every if name.endswith(PICKLES)}
        return Reference("s3", f"//{bucket}/{path}@{revision}"), replace(begun, files={**pickles, **begun.files})

    def transfer(self, files: Iterable[RemoteFile]) -> Transfer:
        """What brings these files, of one bucket, here whole."""
        listed = list(files)
        bucket = listed[0].repository.removeprefix("s3://").partition("/")[0]
        return self._fetching(bucket).transfer(listed)

    def _check_allowed(self, place: str) -> None:
        if self.allowed is None or any(place == one or place.startswith(f"{one}/") for one in self.allowed):
            return
        if not self.allowed:
            message = f"{place} is not fetched: this service reads no bucket, until MERGEYARD_S3_SOURCES is set"
        else:
            message = f"{place} may not be read here; allowed is what is below {', '.join(self.allowed)}"
        raise MergeyardError("bucket_not_allowed", message)

    def _listed(self, bucket: str, path: str, place: str) -> list[tuple[str, int, str]]:
        """Name, size in bytes and ETag of each file in the folder, by name."""
        found = list(islice(self._open(bucket).listed(path), MAX_OBJECTS + 1))
        if len(found) > MAX_OBJECTS:
            raise MergeyardError(
                "source_too_large", f"{place} holds more than {MAX_OBJECTS} objects; name a folder in it"
            )
        files = sorted((key[len(path) + 1 :], size, etag) for key, size, etag in found)
        if not any("/" not in name for name, _, _ in files):
            raise MergeyardError("source_not_found", f"{place} is not there, or has no files")
        return [file for file in files if "/" not in file[0]]

    def _fetching(self, bucket: str) -> Fetching:
        cache = FetchCache(self.settings.hub_files, keep_free=self.settings.min_free_bytes)
        return Fetching(cache, lambda: BucketWire(self._open(bucket)))

    def _open(self, bucket: str) -> Bucket:
        from app.artifacts.bucket import Bucket  # noqa: PLC0415 (whoever names no bucket need not wait for its import)

        return Bucket.of(self.settings, bucket, called="The bucket", code="bucket_unavailable")


class BucketWire:
    """A Wire to a bucket. Raises `bucket_unavailable`, `source_not_found`, `source_changed`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @contextlib.contextmanager
    def opened(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        """The file's bytes from ``start`` on, as they come, of the version that was pinned."""
        with contextlib.closing(self._bucket.reader(file.key, start, file.size, file.etag)) as reader:
            try:
                yield iter(lambda: reader.read(PIECE_BYTES), b"")
            except FileNotFoundError:
                raise MergeyardError("source_not_found", f"{file.name} of {file.repository} is gone") from None

    def start_of(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes ``start`` up to ``stop``, or up to the file's end."""
        return start_by_opening(self, file, start, stop)

    def ended(self, file: RemoteFile, size: int) -> MergeyardError:
        """What to say of a file that ended after ``size`` bytes, without an error."""
        message = f"{file.name} of {file.repository} ended after {size} of {file.size} bytes."
        return MergeyardError("bucket_unavailable", message)


def _revision(files: Iterable[tuple[str, int, str]]) -> str:
    """40 hex digits that are others for any other version of any file."""
    lines = "".join(f"{name}\n{size}\n{etag}\n" for name, size, etag in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:40]


def _remote(place: str, path: str, revision: str, name: str, size: int, etag: str) -> RemoteFile:
    return RemoteFile(
        origin="bucket",
        repository=place,
        commit=revision,
        name=name,
        size=size,
        digest=hashlib.sha256(f"{place}/{name}\n{size}\n{etag}".encode()).hexdigest(),
        key=f"{path}/{name}",
        etag=etag,
    )
