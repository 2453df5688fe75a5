"""JSON as RFC 8259 has it: UTF-8, no key twice, no NaN, no infinity. Users' files and requests are read with this.

And as this project writes it into files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_VALUES = 3_000_000  # a value takes up to 300 bytes of memory, and as few as three of a file
MAX_DEPTH = 64  # so that nothing that walks or writes a value later runs out of stack
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON escapes one; two of them in a row may be a pair


def loads(text: str | bytes) -> Any:
    """Parse JSON.

    Raises ValueError on syntax errors, duplicate keys, NaN and infinities, bytes that are not UTF-8, nesting deeper
    than MAX_DEPTH and more than MAX_VALUES values.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def loads_document(content: bytes) -> Any:
    """Parse JSON whose parts are written again: as ``loads``, and ValueError on lone surrogates."""
    value = loads(content)
    if SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def file_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON for a file: indented by two, in UTF-8, with a line feed at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        value[key] = item
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond any float")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
