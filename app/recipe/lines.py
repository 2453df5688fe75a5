"""Where in a recipe's text the place stands that a problem names."""

from __future__ import annotations

import re

import yaml

_MARK = re.compile(r"line (\d+), column \d+")
_ITEM = re.compile(r"\[(\d+)\]")


def line_of(text: str, where: str) -> int | None:
    """The line (from 1) of ``models[0].parameters.density``, or of what is there of it; None where nothing is.

    The text is not made into values, so nothing in it unfolds.
    """
    if (mark := _MARK.fullmatch(where)) is not None:
        return int(mark[1])
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.CSafeLoader) if node is not None]
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    if not where or not documents:
        return None
    node, line = documents[0], None
    if len(documents) > 1 and (several := re.match(r"documents\[(\d+)\]\.?", where)) is not None:
        number = int(several[1])
        if number >= len(documents):
            return None
        node, where = documents[number], where[several.end() :]
        line = node.start_mark.line + 1
    while where:
        found = _step(node, where)
        if found is None:
            return line
        node, line, where = found
    return line


def _step(node: yaml.Node, where: str) -> tuple[yaml.Node, int, str] | None:
    """One key or index further: the node there, its line, and what is left of the place."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # a key may itself have a dot in it
            name = key.value
            if isinstance(name, str) and name and where.startswith(name) and where[len(name) :][:1] in ("", ".", "["):
                return value, key.start_mark.line + 1, where[len(name) :].removeprefix(".")
    elif isinstance(node, yaml.SequenceNode) and (item := _ITEM.match(where)) and int(item[1]) < len(node.value):
        value = node.value[int(item[1])]
        return value, value.start_mark.line + 1, where[item.end() :].removeprefix(".")
    return None
