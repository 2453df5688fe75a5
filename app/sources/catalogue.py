"""What can be merged: every model and adapter below the roots and among the uploads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import MergeyardError
from app.sources.adapters import CONFIG as ADAPTER_CONFIG
from app.sources.models import read_json
from app.sources.references import parse_reference
from app.sources.resolver import list_files

MODEL_CONFIG = "config.json"
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

    What no recipe could name is passed over: folders with files behind links that lead outside their root, or with
    names that no reference can have.
    """
    found: dict[str, CatalogueEntry] = {}
    for root in roots:
        real_root = root.resolve()
        for folder in _folders(real_root):
            entry = _entry(folder, f"models:{folder.relative_to(real_root).as_posix()}", within=real_root)
            if entry and entry.reference not in found:  # the first root wins, as in resolving
                found[entry.reference] = entry
    for folder in uploads:
        entry = _entry(folder, f"upload:sha256-{folder.name}", within=folder.resolve())
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


def _entry(folder: Path, reference: str, *, within: Path) -> CatalogueEntry | None:
    try:
        parse_reference(reference)
        return _read_entry(folder, reference, within)
    except (MergeyardError, OSError):
        return None  # not ours to read


def _read_entry(folder: Path, reference: str, within: Path) -> CatalogueEntry | None:
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        return None
    files = list_files(folder.resolve(), within=within)
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    kind, config_name = ("adapter", ADAPTER_CONFIG) if ADAPTER_CONFIG in files else ("model", MODEL_CONFIG)
    if not weights:
        return None
    try:
        config = read_json(files[config_name], reference)
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
