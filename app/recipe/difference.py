"""A recipe as YAML text for people, and where two such texts differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import yaml

from app.recipe.text import FLOAT

CONTEXT = 3  # lines around a difference


class _Dumper(yaml.SafeDumper):
    """One line a value, so that texts can be compared; a list of plain values is one. Reads back as it was."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value and _block_safe(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _block_safe(value: str) -> bool:
    """Whether a literal block says the same: no trailing blanks, and nothing that YAML escapes."""
    return all(line == line.rstrip() and line.isprintable() for line in value.split("\n"))


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    plain = all(not isinstance(item, list | dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe (JSON values) as YAML that ``load`` reads as the same; several documents with ``---`` between."""
    documents = recipe.get("documents")
    several = len(recipe) == 1 and isinstance(documents, list) and len(documents) > 1
    parts = documents if several and documents else [dict(recipe)]
    return "---\n".join(
        yaml.dump(part, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)
        for part in parts
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A line of either text or of both, and its number in each, from 1."""

    change: Literal["same", "removed", "added"]
    before: int | None
    after: int | None
    text: str


def difference(before: str, after: str, *, context: int = CONTEXT) -> tuple[tuple[Line, ...], ...]:
    """What to take out of ``before`` and put into it to have ``after``: groups of lines, none where they are equal."""
    old, new = before.splitlines(), after.splitlines()
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    groups = []
    for group in matcher.get_grouped_opcodes(context):
        lines: list[Line] = []
        for change, i1, i2, j1, j2 in group:
            if change == "equal":
                lines += [Line("same", i + 1, j1 + i - i1 + 1, old[i]) for i in range(i1, i2)]
            else:
                lines += [Line("removed", i + 1, None, old[i]) for i in range(i1, i2)]
                lines += [Line("added", None, j + 1, new[j]) for j in range(j1, j2)]
        if lines:
            groups.append(tuple(lines))
    return tuple(groups)
