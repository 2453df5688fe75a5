"""Files of the artifact store as something that is fetched, where the store is no folder of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from app.artifacts.store import ArtifactStore
from app.errors import MergeyardError
from app.settings import Settings
from app.sources.fetching.cache import PIECE_BYTES, FetchCache
from app.sources.fetching.fetching import Fetching
from app.sources.fetching.transfer import start_by_opening
from app.sources.source import RemoteFile


def from_store(store: ArtifactStore, settings: Settings) -> Fetching:
    """What brings the store's files here, into the same folder as the hub's."""
    cache = FetchCache(settings.hub_files, keep_free=settings.min_free_bytes)
    return Fetching(cache, lambda: StoreWire(store))


class StoreWire:
    """A Wire to the store. Raises `store_unavailable`, and `source_not_found` for what was deleted meanwhile."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def start_of(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes ``start`` up to ``stop``, or up to the file's end."""
        return start_by_opening(self, file, start, stop)

    @contextlib.contextmanager
    def opened(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        """The file's bytes from ``start`` on, as they come, and no more of them than the file has."""
        try:
            with contextlib.closing(self._store.open(file.key, start)) as stored:
                if stored.size != file.size:
                    raise self.ended(file, stored.size)
                yield iter(lambda: stored.read(PIECE_BYTES), b"")
        except FileNotFoundError:
            message = f"{file.name} of {file.repository} is not in the store any more"
            raise MergeyardError("source_not_found", message) from None

    def ended(self, file: RemoteFile, size: int) -> MergeyardError:
        """What to say of a file that ended after ``size`` bytes, without an error."""
        message = f"{file.name} of {file.repository} has {size} bytes in the artifact store, not {file.size}."
        return MergeyardError("store_unavailable", message)
