"""What can be merged: every model and adapter below the roots and among the uploads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import MergeyardError
from app.sources.adapters import CONFIG as ADAPTER_CONFIG
from app.sources.models import read_json

MAX_DEPTH = 6
MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One source: its ``reference``, ``kind`` (model, adapter), bytes of weights, and what its config says it is.

    ``detail`` is the architecture of a model, the base's name of an adapter; empty where unknown.
    """

    reference: str
    kind: str
    size: int
    detail: str


def catalogue(roots: Sequence[Path], uploads: Iterable[Path] = ()) -> list[CatalogueEntry]:
    """List every source below ``roots`` and in the folders of ``uploads`` by reference, without reading weights.

    Links that lead outside a root are passed over.
    """
    found: dict[str, CatalogueEntry] = {}
    for root in roots:
        for folder in _folders(root.resolve()):
            name = folder.relative_to(root.resolve()).as_posix()
            entry = _entry(folder, f"models:{name}")
            if entry and entry.reference not in found:  # the first root wins, as in resolving
                found[entry.reference] = entry
    for folder in uploads:
        entry = _entry(folder, f"upload:sha256-{folder.name}")
        if entry:
            found[entry.reference] = entry
    return sorted(found.values(), key=lambda entry: entry.reference)


def _folders(root: Path) -> Iterator[Path]:
    count = 0
    for current, folders, _ in os.walk(root):
        folders.sort()
        if len(Path(current).relative_to(root).parts) >= MAX_DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in list(folders):
            folder = Path(current, name)
            if folder.is_symlink() and not folder.resolve().is_relative_to(root):
                folders.remove(name)
                continue
            count += 1
            if count > MAX_ENTRIES:
                return
            yield folder


def _entry(folder: Path, reference: str) -> CatalogueEntry | None:
    try:
        return _read_entry(folder, reference)
    except OSError:
        return None  # not ours to read


def _read_entry(folder: Path, reference: str) -> CatalogueEntry | None:
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    kind, config_name = "model", "config.json"
    if (folder / ADAPTER_CONFIG).is_file():
        kind, config_name = "adapter", ADAPTER_CONFIG
    if not weights or not (folder / config_name).is_file():
        return None
    try:
        config = read_json(folder / config_name, reference)
    except MergeyardError:
        config = {}
    if kind == "adapter":
        detail = str(config.get("base_model_name_or_path") or "")
    else:
        architectures = config.get("architectures")
        detail = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return CatalogueEntry(
        reference=reference, kind=kind, size=sum(path.stat().st_size for path in weights), detail=detail
    )
