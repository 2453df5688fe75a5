"""The store that the settings name."""

from __future__ import annotations

from app.artifacts.store import ArtifactStore, LocalStore
from app.settings import Settings


def open_store(settings: Settings) -> ArtifactStore:
    """A folder, or a bucket where the setting is an ``s3://`` URL. Nothing is asked of it yet."""
    if settings.bucket is None:
        return LocalStore(settings.artifacts, keep_free=settings.min_free_bytes)
    from app.artifacts.objects import ObjectStore  # noqa: PLC0415 (whoever has a folder need not wait for its import)

    return ObjectStore.of(settings)
