"""References as users write them, in canonical form.

``models:PATH`` below a root, ``upload:sha256-…``, ``merge:ID``, ``hf:ORG/NAME@REVISION``, ``s3://BUCKET/PATH``, and a
bare path as in a mergekit YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from app.errors import MergeyardError

Scheme = Literal["models", "upload", "merge", "hf", "s3", "bare"]
UPLOAD = re.compile(r"sha256-[0-9a-f]{64}")
MERGE_ID = re.compile(r"[\w.-]{1,96}", re.ASCII)
REPOSITORY = re.compile(r"(?![.-])[\w.-]{1,96}(/(?![.-])[\w.-]{1,96})?", re.ASCII)
REVISION = re.compile(r"(?!/)[\w./-]{1,200}", re.ASCII)
BUCKET_PATH = re.compile(
    r"//(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<path>[\w. -]+(/[\w. -]+)*)/?(@(?P<revision>[0-9a-f]{40}))?",
    re.ASCII,
)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
MAX_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class Reference:
    """``scheme`` and what follows it; ``str()`` gives the canonical form."""

    scheme: Scheme
    name: str

    def __str__(self) -> str:
        return self.name if self.scheme == "bare" else f"{self.scheme}:{self.name}"


def parse_reference(text: str) -> Reference:
    """Raises MergeyardError `reference_invalid`, `not_supported`."""
    if not text or len(text) > MAX_LENGTH or not text.isprintable():
        raise MergeyardError("reference_invalid", "A reference is a name of at most 1000 printable characters")
    scheme, colon, name = text.partition(":")
    if not colon or "/" in scheme:
        return Reference("bare", text)
    match scheme:
        case "models":
            if not name:
                raise MergeyardError("reference_invalid", "`models:` needs a path below a model root")
            return Reference("models", name)
        case "upload":
            if not UPLOAD.fullmatch(name):
                message = f"{text[:80]} is not an upload; POST /uploads answers upload:sha256-<64 hex digits>"
                raise MergeyardError("reference_invalid", message)
            return Reference("upload", name)
        case "merge":
            if not MERGE_ID.fullmatch(name):
                raise MergeyardError("reference_invalid", f"{text[:80]} is not the id of a merge")
            return Reference("merge", name)
        case "hf":
            if not names_repository(name):
                message = f"{text[:80]} is no model of the hub; they are named as hf:ORG/NAME or hf:ORG/NAME@REVISION"
                raise MergeyardError("reference_invalid", message)
            return Reference("hf", name)
        case "s3":
            found = BUCKET_PATH.fullmatch(name)
            if found is None or {".", ".."} & set(found["path"].split("/")):
                message = f"{text[:80]} is no folder of a bucket; they are named as s3://BUCKET/PATH"
                raise MergeyardError("reference_invalid", message)
            return Reference("s3", name)
    kinds = "models:PATH, upload:DIGEST, merge:ID, hf:ORG/NAME@REVISION or s3://BUCKET/PATH"
    message = f"{scheme[:20]}: is not a kind of reference; use {kinds}"
    raise MergeyardError("reference_invalid", message)


def names_repository(name: str) -> bool:
    """Whether a text may be a repository of the hub, with or without a revision."""
    repository, revision = split_revision(name)
    ambiguous = ".." in name or "--" in repository
    return not ambiguous and bool(REPOSITORY.fullmatch(repository)) and bool(REVISION.fullmatch(revision))


def split_revision(name: str) -> tuple[str, str]:
    """``ORG/NAME@REVISION`` → (repository, revision); without one it is the branch main."""
    repository, at, revision = name.partition("@")
    return repository, revision if at else MAIN


def is_immutable(text: str) -> bool:
    """Whether what a canonical reference names never changes, as uploads, merges, and what has a commit do not."""
    return all(
        part.startswith(("upload:", "merge:"))
        or (part.startswith(("hf:", "s3:")) and bool(COMMIT.fullmatch(split_revision(part)[1])))
        for part in text.split("+")
    )


def split_adapter(text: str) -> tuple[str, str | None]:
    """mergekit's ``base+adapter`` → (base, adapter); without a plus sign (text, None).

    The base may be one with an adapter on it itself: the last adapter is the one that is put on top.
    """
    model, plus, adapter = text.rpartition("+")
    return (model, adapter) if plus and model and adapter else (text, None)


def model_of(text: str) -> str:
    """The model that a reference starts from, without the adapters on it."""
    return text.partition("+")[0]
