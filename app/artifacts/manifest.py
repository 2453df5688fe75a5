"""The manifest: what an artifact consists of and how it came to be. ``mergeyard.json`` is its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.tasks.task import TaskScore

MANIFEST_NAME = "mergeyard.json"


def commit_of(manifest_sha256: str) -> str:
    """The 40 hex digits that hub clients know an artifact by: the same for the same files, and never for others."""
    return manifest_sha256[:40]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of an artifact: the ``name`` users see, the ``key`` it has in the store, its size and digest."""

    name: str
    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """A source as it was read: its reference, its role, and the sha256 of each of its files."""

    reference: str
    role: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """What the merge did to one tensor.

    ``trimmed``: share of each source's values set to zero; ``sign_conflict``: of the parameters that at least one
    source still changes, the share where sources disagree in sign (None where factors were merged and no values
    compared; of the factors' own space where those were); ``source_norms``: ‖δ‖₂ before the trim;
    ``merged_norm``: ‖result - base‖₂, before the cast. ``retained_energy``: the share of ‖result - base‖² that an
    adapter holds (1 where that is 0), None in a checkpoint. Lists are in the order of ``sources`` (indices).
    """

    sources: tuple[int, ...]
    trimmed: tuple[float, ...]
    sign_conflict: float | None
    source_norms: tuple[float, ...]
    merged_norm: float
    parameters: int
    retained_energy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRecord:
    """A merge whose result the last one read and which is no part of the artifact: another document of the recipe."""

    name: str
    fingerprint: str
    sources: tuple[SourceRecord, ...]
    statistics: Mapping[str, TensorStatistics]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """``files`` excludes the manifest. ``fingerprint`` is the plan's digest; ``versions`` names the libraries, and the
    GPU where one was used.
    """

    fingerprint: str
    recipe: Mapping[str, Any]
    sources: tuple[SourceRecord, ...]
    files: tuple[StoredFile, ...]
    statistics: Mapping[str, TensorStatistics]
    versions: Mapping[str, str]
    warnings: tuple[Mapping[str, str], ...] = ()
    earlier: tuple[EarlierRecord, ...] = ()
    evaluation: tuple[TaskScore, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON-ready form. Store keys stay out: they are the store's business and name attempts."""
        value = asdict(self)
        for file in value["files"]:
            del file["key"]
        return value
