"""What the hub has said of commits. A commit stays what it is, so none is asked about twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.sources.fetching.cache import write_whole


class Listings:
    """In ``folder``, which may be deleted at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, repository: str, commit: str) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self._path(repository, commit).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep(self, repository: str, commit: str, listing: Mapping[str, Any]) -> None:
        write_whole(self._path(repository, commit), json.dumps(listing).encode())

    def _path(self, repository: str, commit: str) -> Path:
        return self._folder / f"{repository.replace('/', '--')}@{commit}.json"
