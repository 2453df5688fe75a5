"""Which parts of the service can work: what /readyz answers, and /metrics tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from app.artifacts.store import ArtifactStore, check_folder
from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.database import Database


class Readiness:
    """Looks at the database (reachable, and migrated to this version), the broker, and the folders of the artifact
    store and of the data (uploads).
    """

    def __init__(self, database: Database, bell: Bell, *, store: ArtifactStore, data: Path) -> None:
        self._checks: Mapping[str, Callable[[], None]] = {
            "database": database.check,
            "queue": bell.check,
            "store": store.check,
            "data": lambda: check_folder(data, "The data folder"),
        }

    def look(self) -> Mapping[str, MergeyardError | None]:
        """By part, what keeps it from working; None where nothing does. A part that is away takes seconds."""
        found: dict[str, MergeyardError | None] = {}
        for part, check in self._checks.items():
            try:
                check()
                found[part] = None
            except MergeyardError as error:
                found[part] = error
        return found
