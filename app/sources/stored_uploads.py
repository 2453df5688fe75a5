"""Uploads in the artifact store, where that is a bucket: other hosts have no folder in common with this one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.artifacts.store import ArtifactStore, read_whole
from app.sources.accepted import is_accepted, is_task_file
from app.sources.catalogue import CatalogueEntry
from app.sources.fetching.fetching import WEIGHTS, Fetching
from app.sources.source import FoundFiles, RemoteFile

if TYPE_CHECKING:
    from app.sources.uploads import Upload

FOLDER = ".uploads"  # no job is called so
LIST = "files.json"
PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUploads:
    """``.uploads/<digest>/<sha256>`` for each file, and a list of them that is written last."""

    store: ArtifactStore
    fetching: Fetching

    def keep(self, upload: Upload, folder: Path) -> None:
        """Put the upload's files, which lie in ``folder``, into the store. Raises ``store_unavailable``."""
        for file in upload.files:
            key = _key(upload.digest, file.sha256)
            with (folder / file.name).open("rb") as stream, self.store.create(key, file.size) as writer:
                while piece := stream.read(PIECE_BYTES):
                    writer.write(piece)
        listed = {"kind": upload.kind, "files": [asdict(file) for file in upload.files]}
        with self.store.create(_key(upload.digest, LIST)) as writer:
            writer.write(json.dumps(listed).encode())

    def entry(self, digest: str) -> CatalogueEntry | None:
        """The upload as it is listed; None where it is not there."""
        if (found := self._list(digest)) is None:
            return None
        size = sum(file["size"] for file in found["files"] if file["name"].endswith(WEIGHTS))
        return CatalogueEntry(reference=f"upload:sha256-{digest}", kind=found["kind"], size=size, detail="")

    def files(self, digest: str) -> FoundFiles | None:
        """The upload's files as a source; None where it is not there, or not all of it yet."""
        if (found := self._list(digest)) is None:
            return None
        there = [
            RemoteFile(
                origin="store",
                repository=f"upload:sha256-{digest}",
                commit=digest,
                name=file["name"],
                size=file["size"],
                digest=file["sha256"],
                key=_key(digest, file["sha256"]),
            )
            for file in found["files"]
            if is_accepted(file["name"]) or is_task_file(file["name"])
        ]
        return self.fetching.begun(there)

    def _list(self, digest: str) -> dict[str, Any] | None:
        try:
            found = json.loads(read_whole(self.store, _key(digest, LIST)))
        except FileNotFoundError:
            return None
        assert isinstance(found, dict)
        return found


def _key(digest: str, name: str) -> str:
    return f"{FOLDER}/{digest}/{name}"
