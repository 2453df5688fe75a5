"""A reference → the files it names, never outside what the operator allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.errors import MergeyardError
from app.sources.accepted import TASK, is_task_file
from app.sources.adapters import load_adapter
from app.sources.buckets import Buckets
from app.sources.hub.hub import Hub
from app.sources.models import companions_of, load_model
from app.sources.opening import read_small
from app.sources.references import Reference, names_repository, parse_reference
from app.sources.source import AdapterSource, FoundFiles, ModelSource, RemoteFile, SourceFile
from app.tasks.shipped import SHIPPED, shipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a reference leads to: real paths by name. Of those that are ``remote`` nothing but the header is here."""

    reference: Reference
    files: Mapping[str, Path]
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver:
    """Where references lead.

    ``roots`` are the allow-listed folders; ``uploads`` the content-addressed folder, of which ``may_use`` (of a digest,
    sha256 hex) says what is there for whoever asks, and ``stored`` finds what is elsewhere of it; ``buckets`` are asked
    for ``s3:`` references; ``merges`` finds a published merge by id, or raises
    `source_not_found`; ``local`` (only for local commands, never the service) lets bare references be
    plain paths, absolute or relative to that folder. ``hub`` is asked for ``hf:`` references, and for bare ones that
    are nowhere else; a revision that moves meanwhile stays what it was when it was first met (``met``). ``documents``
    are the models that the recipe's other documents make, by what it calls them; they are meant before anything else.
    No path is called by one of their ``names``. ``read`` keeps what was read, by what it was called, for whoever plans
    many recipes of the same sources at one moment; None reads anew.
    """

    roots: Sequence[Path] = ()
    uploads: Path | None = None
    may_use: Callable[[str], bool] = lambda _: True
    stored: Callable[[str], FoundFiles | None] = lambda _: None
    buckets: Buckets | None = None
    merges: Callable[[str], FoundFiles] | None = None
    local: Path | None = None
    hub: Hub | None = None
    met: dict[str, Found] = field(default_factory=dict)
    documents: Mapping[str, ModelSource] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    read: dict[str, ModelSource | AdapterSource] | None = None

    def model(self, text: str) -> ModelSource:
        """A full model. Raises MergeyardError as `canonical` and `load_model` do."""
        if text in self.documents:
            return self.documents[text]
        if isinstance(known := (self.read or {}).get(text), ModelSource):
            return known
        found = self._find(text)
        model = load_model(found.files, str(found.reference), found.remote)
        if self.read is not None:
            self.read[text] = model
        return model

    def adapter(self, text: str) -> AdapterSource:
        """A PEFT adapter. Raises MergeyardError as `canonical` and `load_adapter` do."""
        if text in self.documents:
            message = f"{text} is a document of this recipe, which makes a model; name it under `model:`"
            raise MergeyardError("reference_invalid", message)
        if isinstance(known := (self.read or {}).get(text), AdapterSource):
            return known
        found = self._find(text)
        adapter = load_adapter(found.files, str(found.reference), found.remote)
        if self.read is not None:
            self.read[text] = adapter
        return adapter

    def companions(self, text: str) -> tuple[SourceFile, ...]:
        """What travels with a model's weights, where only that is wanted. Raises MergeyardError as `canonical` does."""
        if text in self.documents:
            return self.documents[text].companions
        return companions_of(self._find(text).files)

    def files(self, text: str) -> FoundFiles:
        """A source's files by name, unread. Raises MergeyardError as `canonical` does."""
        found = self._find(text)
        return FoundFiles(files=found.files, remote=found.remote)

    def task_file(self, text: str) -> tuple[str, bytes]:
        """A task file: its canonical reference, and its bytes.

        ``shipped:NAME``, ``upload:DIGEST`` (an upload of one task file), or a file below the roots, or (local commands)
        a plain path.

        Raises:
            MergeyardError: as `canonical`, `source_format` (too large a file).
        """
        if text.startswith(SHIPPED):
            return text, shipped(text.removeprefix(SHIPPED))
        reference = parse_reference(text)
        if reference.scheme == "upload":
            files = [path for name, path in self._find(text).files.items() if is_task_file(name)]
            if len(files) != 1:
                raise MergeyardError("source_not_found", f"{text} is no task file: upload one {TASK} file by itself")
            return str(reference), _content(files[0], text)
        if reference.scheme not in ("models", "bare"):
            message = f"{text} cannot name a task file; use models:PATH{TASK}, upload:DIGEST or {SHIPPED}NAME"
            raise MergeyardError("reference_invalid", message)
        folder, _, name = reference.name.rpartition("/")
        find = self._below_roots if reference.scheme == "models" else replace(self, hub=None, names=frozenset())._bare
        found = find(folder or ".", text)
        if (path := found.files.get(name)) is None:
            raise MergeyardError("source_not_found", f"{text} is not there; task files are JSONL")
        parent = found.reference.name
        known = Reference(found.reference.scheme, name if parent == "." else f"{parent}/{name}")
        return str(known), _content(path, text)

    def canonical(self, text: str) -> str:
        """The canonical form of a reference that exists (two spellings of one source become equal).

        Of ``base+adapter`` each part is put into its own.

        Raises:
            MergeyardError: `reference_invalid`, `not_supported`, `path_outside_roots`, `source_not_found`, and what
                `Hub.files` raises.
        """
        if text in self.documents:
            return self.documents[text].reference
        parts = text.split("+")
        if len(parts) > 1 and all(parts):
            return "+".join(map(self.canonical, parts))
        return str(self._find(text).reference)

    def _find(self, text: str) -> Found:
        reference = parse_reference(text)
        match reference.scheme:
            case "upload":
                return self._uploaded(reference, text)
            case "merge":
                if self.merges is None:
                    raise MergeyardError("source_not_found", f"{text} can be used through the service only")
                return _found(reference, self.merges(reference.name))
            case "models":
                return self._below_roots(reference.name, text)
            case "s3":
                return self._in_bucket(reference, text)
            case "hf":
                if self.hub is None:
                    raise MergeyardError("hub_not_allowed", f"{text} cannot be fetched: no hub is asked here")
                return self._on_hub(self.hub, reference.name)
            case "bare":
                return self._bare(reference.name, text)

    def _uploaded(self, reference: Reference, text: str) -> Found:
        digest = reference.name.removeprefix("sha256-")
        if self.uploads is not None and self.may_use(digest):
            if (upload := self.uploads / digest).is_dir():
                return Found(reference=reference, files=list_files(upload, within=upload))
            if (stored := self.stored(digest)) is not None:
                return _found(reference, stored)
        raise MergeyardError("source_not_found", f"{text} does not exist; upload the files again")

    def _in_bucket(self, reference: Reference, text: str) -> Found:
        if self.buckets is None:
            raise MergeyardError("bucket_not_allowed", f"{text} cannot be fetched: no bucket is asked here")
        if text not in self.met:
            self.met[text] = _found(*self.buckets.files(reference.name))
        return self.met[text]

    def _bare(self, name: str, text: str) -> Found:
        if self.local is None or not os.path.isdir(folder := self.local / name):  # noqa: PTH112
            return self._below_roots_or_on_hub(name, text)
        # relative to the recipe where it can be, so that two spellings of one folder are equal
        real, here = folder.resolve(), self.local.resolve()
        known = real.relative_to(here).as_posix() if real.is_relative_to(here) else real.as_posix()
        known = real.as_posix() if known in self.names else known
        return Found(reference=Reference("bare", known), files=list_files(folder))

    def _below_roots_or_on_hub(self, name: str, text: str) -> Found:
        """Where mergekit would look for it, too."""
        try:
            return self._below_roots(name, text)
        except MergeyardError as error:
            on_hub = "/" in name and names_repository(name) and self.hub is not None and self.hub.allows(name)
            if error.code != "source_not_found" or not on_hub:
                raise
            assert self.hub is not None
            try:
                return self._on_hub(self.hub, name)
            except MergeyardError as missing:
                raise MergeyardError(missing.code, f"{error.message}. {missing.message}") from None

    def _on_hub(self, hub: Hub, name: str) -> Found:
        if name not in self.met:
            there = hub.files(name)
            self.met[name] = Found(reference=there.reference, files=there.paths, remote=there.remote)
        return self.met[name]

    def _below_roots(self, path: str, text: str) -> Found:
        """The first root that holds ``path``. What leads outside a root, by .. or by a link, is refused."""
        if not self.roots:
            message = f"{text} cannot be looked up: the service has no model roots (MERGEYARD_MODEL_ROOTS)"
            raise MergeyardError("source_not_found", f"{message}{self._or_documents()}")
        escaped = Path(path).is_absolute() or ".." in Path(path).parts
        for root in [] if escaped else self.roots:
            try:
                real_root = root.resolve()
                folder = (real_root / path).resolve()
                found = folder.is_dir()
            except (OSError, RuntimeError, ValueError):
                continue  # a loop of links, or a name this file system cannot have
            if not folder.is_relative_to(real_root):
                escaped = True
            elif found:
                name = folder.relative_to(real_root).as_posix()
                return Found(reference=Reference("models", name), files=list_files(folder, within=real_root))
        if escaped:
            message = f"{text} leads outside the model roots; name a folder below one of them"
            raise MergeyardError("path_outside_roots", message)
        message = f"{text} is not below any model root; GET /sources lists what is there"
        if "@" in path:
            message += ". Folders have no revisions: leave out what follows the @, unless a folder is named so"
            message += ". Of the hub it would be hf:ORG/NAME@REVISION"
        raise MergeyardError("source_not_found", f"{message}{self._or_documents()}")

    def _or_documents(self) -> str:
        names = [name for name in self.documents if "+" not in name]
        return f"; the documents before it are {', '.join(names)}" if names else ""


def _found(reference: Reference, files: FoundFiles) -> Found:
    paths = {name: path.resolve() for name, path in files.files.items()}
    return Found(reference=reference, files=paths, remote=files.remote)


def _content(path: Path, text: str) -> bytes:
    try:
        return read_small(path)[0]
    except OSError as error:
        raise MergeyardError("source_not_found", f"{text} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise MergeyardError("source_format", f"{text} is {error}") from None


def list_files(folder: Path, within: Path | None = None) -> dict[str, Path]:
    """The regular files directly in a folder, by name, with their real paths.

    ``within`` refuses links that lead outside it (`path_outside_roots`).
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise MergeyardError("source_not_found", f"{folder.name} cannot be read: {error.strerror}") from None
    files = {}
    for entry in entries:
        try:
            real = entry.resolve()
        except (OSError, RuntimeError):
            continue  # a loop of links
        if not real.is_file():
            continue
        if within is not None and not real.is_relative_to(within.resolve()):
            message = f"{entry.name} in {folder.name} is a link that leads outside the model roots"
            raise MergeyardError("path_outside_roots", message)
        files[entry.name] = real
    return files
