"""What belongs to an owner besides merges: uploads. Equal uploads are one folder in the store, and a row an owner.

The folder alone gives nobody anything: an upload exists for an owner once that owner has sent its bytes.
"""

from __future__ import annotations

from functools import partial

from sqlalchemy import Select, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.artifacts.store import ArtifactStore
from app.records import quotas
from app.records.audit import record
from app.records.database import Database, clock
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.published import merged_files
from app.records.quotas import NO_LIMITS, Limits
from app.records.tables import uploads
from app.settings import Settings
from app.sources.buckets import Buckets
from app.sources.fetching.stored import from_store
from app.sources.hub.hub import Hub
from app.sources.resolver import Resolver
from app.sources.stored_uploads import StoredUploads
from app.sources.uploads import Upload


class OwnedUploads:
    """Who has uploaded what. A digest is the sha256 hex in ``upload:sha256-…``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(self, upload: Upload, *, by: Caller, limits: Limits = NO_LIMITS) -> bool:
        """The caller's owner has sent these bytes. False where they had before.

        Raises ``over_quota`` or ``storage_full`` where ``limits`` leave no room for them.
        """
        try:
            with self.database.write() as connection:
                record(connection, by, "uploaded", upload.reference)
                mine = (uploads.c.owner == by.owner, uploads.c.digest == upload.digest)
                sent = update(uploads).where(*mine).values(size=upload.size)  # what was sent long ago has no size yet
                if connection.execute(sent).rowcount:
                    return False
                quotas.admit_upload(connection, by.owner, upload.size, limits)
                row = {"owner": by.owner, "digest": upload.digest, "size": upload.size}
                connection.execute(insert(uploads).values(**row, created_at=clock(connection)))
                return True
        except IntegrityError:  # the same owner sent them twice at once; on PostgreSQL both find nothing
            return False

    def has(self, owner: str, digest: str) -> bool:
        with self.database.read() as connection:
            return bool(connection.execute(_row(owner, digest)).scalar_one())

    def of(self, owner: str) -> frozenset[str]:
        """The digests of everything the owner has uploaded."""
        with self.database.read() as connection:
            return frozenset(connection.scalars(select(uploads.c.digest).where(uploads.c.owner == owner)))


def resolver_of(owner: str, *, settings: Settings, jobs: Jobs, store: ArtifactStore, hub: Hub) -> Resolver:
    """Where ``owner``'s recipes lead: the roots, the hub as far as the operator allows it, and of uploads and merges
    their own alone, also for an admin's key.
    """
    elsewhere = stored_uploads(store, settings)
    return Resolver(
        roots=settings.roots,
        uploads=settings.uploads,
        stored=elsewhere.files if elsewhere else lambda _: None,
        buckets=Buckets.of(settings),
        may_use=partial(OwnedUploads(jobs.database).has, owner),
        merges=partial(merged_files, jobs, store, from_store(store, settings), owner),
        hub=hub,
    )


def stored_uploads(store: ArtifactStore, settings: Settings) -> StoredUploads | None:
    """Where uploads are kept besides this host's folder: in the bucket, where the store is one."""
    return StoredUploads(store=store, fetching=from_store(store, settings)) if settings.bucket else None


def _row(owner: str, digest: str) -> Select[tuple[bool]]:
    return select(exists().where(uploads.c.owner == owner, uploads.c.digest == digest))
