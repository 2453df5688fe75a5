"""Recipe text → plain values: YAML and JSON that cannot run code, repeat a key, or unfold without end."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from app import strict_json
from app.errors import MergeyardError

MAX_TEXT = 256_000  # characters; far above any real recipe, as are the next three
MAX_NODES = 100_000  # YAML aliases can unfold to billions
MAX_DEPTH = 32
MAX_STRING = 2_000
MAX_TEMPLATE = 64_000  # a chat template
MAX_BITS = 256
MAX_DOCUMENTS = 32
FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # what YAML 1.2 reads as a number, and PyYAML does not


class _Loader(yaml.CSafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-3 as the number it is (YAML 1.2)."""

    _merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (``<<``) copy what they name while the text is read, so they are bounded here."""
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "`<<` takes one mapping, not a list of them", value.start_mark
                )
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, "its merge keys unfold to too much", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    FLOAT,
    list("-+0123456789"),
)


def load(text: str | bytes) -> Any:
    """YAML, of which JSON is nearly a subset; what looks like JSON is tried as that first.

    Several documents, one after the other with ``---`` between, are what ``documents: [...]`` is.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise MergeyardError("recipe_syntax", "The recipe is not UTF-8 text") from None
    if len(text) > MAX_TEXT:
        raise MergeyardError("recipe_syntax", f"The recipe is longer than {MAX_TEXT:,} characters")
    try:
        if text.lstrip().startswith("{"):
            try:
                return strict_json.loads(text)
            except json.JSONDecodeError:
                pass  # a YAML flow mapping also starts so
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise MergeyardError("recipe_syntax", f"Not valid YAML: {error.problem}", where=where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MergeyardError("recipe_syntax", f"Not valid YAML: {str(error)[:200]}") from None
    if len(documents) > 1:
        return {"documents": documents}
    return documents[0] if documents else None


def bound(raw: Any) -> None:
    """Refuse what unfolds to more than any recipe needs (aliases of aliases, aliases of themselves)."""
    budget = MAX_NODES
    templates = _templates(raw)
    stack = [(raw, 0)]
    while stack:
        value, depth = stack.pop()
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            raise MergeyardError(
                "recipe_syntax", "The recipe is too large or too deeply nested; check its anchors and aliases"
            )
        longest = MAX_TEMPLATE if any(value is template for template in templates) else MAX_STRING
        if isinstance(value, str) and len(value) > longest:
            raise MergeyardError("recipe_syntax", f"A text in the recipe is longer than {longest:,} characters")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise MergeyardError("recipe_syntax", "A number in the recipe has too many digits")
        if isinstance(value, Mapping):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)


def _templates(raw: Any) -> list[Any]:
    """The chat templates of a recipe and of its documents, where they may be."""
    if not isinstance(raw, Mapping):
        return []
    several = raw.get("documents")
    documents = [raw, *(several[:MAX_DOCUMENTS] if isinstance(several, list) else ())]
    found = [document.get("chat_template") for document in documents if isinstance(document, Mapping)]
    return [template for template in found if isinstance(template, str)]
