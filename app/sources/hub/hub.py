"""``hf:ORG/NAME@REVISION`` → files: pinned to a commit, headers first, and whole when they are to be merged."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from app import strict_json
from app.errors import NO_SPACE, MergeyardError
from app.settings import Settings
from app.sources.accepted import is_accepted
from app.sources.adapters import WEIGHTS as ADAPTER_WEIGHTS
from app.sources.fetching.cache import FetchCache
from app.sources.fetching.fetching import Fetching
from app.sources.fetching.transfer import Transfer
from app.sources.hub.listings import Listings
from app.sources.models import INDEX, PICKLES
from app.sources.opening import MAX_SMALL_BYTES
from app.sources.references import COMMIT, Reference, split_revision
from app.sources.source import RemoteFile

if TYPE_CHECKING:
    from app.sources.hub.wire import Wire

DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """``repositories``: patterns (``org/*``) of what may be named; ``most_bytes``: of one repository's files."""

    endpoint: str
    token: str = field(repr=False)
    repositories: tuple[str, ...]
    cache: Path
    most_bytes: int
    keep_free: int

    @classmethod
    def of(cls, settings: Settings) -> HubSettings:
        """As the service's operator wants it."""
        return cls(
            endpoint=settings.hub_endpoint,
            token=settings.hub_token,
            repositories=tuple(part.strip() for part in settings.hub_repositories.split(",") if part.strip()),
            cache=settings.hub_files,
            most_bytes=settings.hub_max_bytes,
            keep_free=settings.min_free_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """A repository at a commit: ``paths`` by name, and those of them that are ``remote``, of which a header is here."""

    reference: Reference
    paths: Mapping[str, Path]
    remote: Mapping[str, RemoteFile]


class Hub:
    """The hub of one process, and what is here of it. Safe to share between threads."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._fetching = Fetching(FetchCache(settings.cache, keep_free=settings.keep_free), self._connect)
        self._listings = Listings(settings.cache / "listings")
        self._lock = Lock()
        self._wire: Wire | None = None

    def close(self) -> None:
        """End what connections there are; the hub can still be asked."""
        with self._lock:
            if self._wire is not None:
                self._wire.close()
            self._wire = None

    def allows(self, name: str) -> bool:
        """Whether this repository (``ORG/NAME``, perhaps with ``@REVISION``) may be asked for."""
        repository = split_revision(name)[0]
        return any(fnmatch.fnmatchcase(repository, pattern) for pattern in self._settings.repositories)

    def files(self, name: str) -> HubFiles:
        """The files of ``ORG/NAME@REVISION`` that a plan reads: what is small whole, of weights the headers.

        Raises:
            MergeyardError: `hub_not_allowed`, `source_not_found`, `hub_forbidden`, `hub_unavailable`,
                `source_too_large`, `source_format` (a digest or a header that is none), `disk_full`.
        """
        if not self.allows(name):
            raise self._not_allowed(name)
        try:
            return self._files(name)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise _full(self._settings.cache) from error

    def transfer(self, files: Iterable[RemoteFile]) -> Transfer:
        """What brings these files here, whole."""
        return self._fetching.transfer(files)

    def _connect(self) -> Wire:
        from app.sources.hub.wire import Wire  # noqa: PLC0415 (whoever asks no hub need not wait for its import)

        with self._lock:
            if self._wire is None:
                self._wire = Wire(self._settings.endpoint, self._settings.token)
            return self._wire

    def _files(self, name: str) -> HubFiles:
        repository, revision = split_revision(name)
        commit, listing = self._listing(repository, revision)
        wanted = self._wanted(listing, repository, commit)
        paths = self._fetching.small([file for file in wanted if not file.name.endswith(".safetensors")])
        weights = _read_weights(wanted, paths)
        if (size := sum(file.size for file in weights)) > self._settings.most_bytes:
            message = f"{repository} has {size} bytes of weights; at most {self._settings.most_bytes} are fetched"
            raise MergeyardError("source_too_large", message)
        known, remote = self._fetching.weights(weights)
        # Names alone: what is pickled is refused by name, as in any folder, and never fetched.
        pickles = {
            file: self._settings.cache for file in listing["files"] if file.endswith(PICKLES) and "/" not in file
        }
        reference = Reference("hf", f"{repository}@{commit}")
        return HubFiles(reference=reference, paths={**pickles, **paths, **known}, remote=remote)

    def _listing(self, repository: str, revision: str) -> tuple[str, Mapping[str, Any]]:
        from app.sources.hub.wire import listed, unavailable  # noqa: PLC0415

        commit = revision if COMMIT.fullmatch(revision) else None
        if commit is not None and (known := self._listings.of(repository, commit)) is not None:
            return commit, known
        listing = listed(self._connect().info(repository, revision))
        if not COMMIT.fullmatch(str(listing["commit"])) or (commit or listing["commit"]) != listing["commit"]:
            raise unavailable(self._settings.endpoint, f"it answers {repository}@{revision} with another commit")
        self._listings.keep(repository, listing["commit"], listing)
        return listing["commit"], listing

    def _wanted(self, listing: Mapping[str, Any], repository: str, commit: str) -> list[RemoteFile]:
        """The files that are taken at all. Raises ``source_format``, ``source_too_large``."""
        wanted = []
        for name, (size, digest) in sorted(listing["files"].items()):
            if not is_accepted(name):
                continue
            if not isinstance(size, int) or size < 0 or not DIGEST.fullmatch(str(digest)):
                message = f"The hub tells no size and digest of {name} of {repository}, so nothing of it is fetched"
                raise MergeyardError("source_format", message)
            if size > MAX_SMALL_BYTES and not name.endswith(".safetensors"):
                message = f"{name} of {repository} has {size} bytes; at most {MAX_SMALL_BYTES} are taken"
                raise MergeyardError("source_too_large", message)
            wanted.append(RemoteFile(repository=repository, commit=commit, name=name, size=size, digest=digest))
        return wanted

    def _not_allowed(self, name: str) -> MergeyardError:
        repository = split_revision(name)[0]
        if not self._settings.repositories:
            message = f"{repository} is not fetched: this service asks no hub, until MERGEYARD_HUB_REPOSITORIES is set"
        else:
            message = (
                f"{repository} may not be fetched from the hub here; allowed: {', '.join(self._settings.repositories)}"
            )
        return MergeyardError("hub_not_allowed", message)


def _read_weights(wanted: Iterable[RemoteFile], small: Mapping[str, Path]) -> list[RemoteFile]:
    """Of the weights those that a model or an adapter consists of: repositories often have them in other forms too."""
    names = {ADAPTER_WEIGHTS}
    if INDEX in small:
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # the loader says what is wrong with it
            names |= set(map(str, strict_json.loads_document(small[INDEX].read_bytes())["weight_map"].values()))
    else:
        names.add(SINGLE)
    return [file for file in wanted if file.name in names]


def _full(folder: Path) -> MergeyardError:
    return MergeyardError("disk_full", f"The disk of what is fetched from the hub has no room left ({folder.name})")
