"""Tasks that come with Mergeyard: ``shipped:NAME``."""

from __future__ import annotations

from importlib.resources import files

from app.errors import MergeyardError

SHIPPED = "shipped:"
NAMES = ("article-json", "article-sql")  # the two prompts of the article that Mergeyard grew out of


def shipped(name: str) -> bytes:
    """The file's bytes. Raises MergeyardError ``source_not_found``."""
    if name not in NAMES:
        known = ", ".join(SHIPPED + known for known in NAMES)
        raise MergeyardError("source_not_found", f"{SHIPPED}{name[:80]} does not exist; there are {known}")
    return files("app.tasks").joinpath("files", f"{name}.jsonl").read_bytes()
