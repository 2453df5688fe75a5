"""JSON as RFC 8259 has it: no key twice, no NaN, no infinity. Users' files and requests are read with this.

And as this project writes it into files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON escapes one; two of them in a row may be a pair


def loads(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError on syntax errors, duplicate keys, NaN and infinities, and too deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def loads_document(content: bytes) -> Any:
    """Parse JSON whose parts are written again: as ``loads``, and ValueError on all that is not sound UTF-8."""
    value = loads(content.decode("utf-8-sig"))
    if SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def file_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON for a file: indented by two, in UTF-8, with a line feed at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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
