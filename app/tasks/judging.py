"""Whether an answer that was written is right: the metrics that judge texts."""

from __future__ import annotations

import json
import logging
from typing import Any

import regex
import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.expressions import Expression
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers
from sqlglot.optimizer.simplify import simplify

from app.tasks.task import Example, Metric

REGEX_SECONDS = 1.0  # a pattern may take exponential time on a long answer
MAX_SQL = 20_000  # characters; a parser is not made for more

# What sqlglot cannot parse it says on its own logger, once for every answer of a model that is still bad at SQL.
logging.getLogger("sqlglot").setLevel(logging.ERROR)


def is_right(text: str, example: Example, metric: Metric) -> bool:
    """Whether ``text``, the model's answer without its end, is right by ``metric``."""
    match metric:
        case "contains":
            return str(example.answer) in text
        case "regex":
            return _matches(str(example.answer), text)
        case "json":
            return _holds(_json(text), example.answer)
        case "sql":
            return _same_sql(text, str(example.answer))
    raise AssertionError(f"{metric} judges no texts")


def parse_sql(text: str) -> Expression | None:
    """One statement, as it is compared: names that are not quoted in one case, arithmetic and logic simplified.

    None where it is not one statement of SQL.
    """
    if len(text) > MAX_SQL:
        return None
    try:
        parsed = [statement for statement in sqlglot.parse(text) if statement is not None]
        if len(parsed) != 1 or parsed[0].key in ("command", "column", "literal", "alias", "identifier"):
            return None  # what it does not know it keeps as a text, or reads as an expression
        compared: Expression = simplify(normalize_identifiers(parsed[0]))
    except (SqlglotError, RecursionError, ValueError):
        return None
    return compared


def _matches(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=REGEX_SECONDS) is not None
    except TimeoutError:
        return False


def _json(text: str) -> Any:
    """The answer's JSON; of a fenced block what is in it. A text that is none is like null, which holds nothing."""
    text = text.strip()
    if fenced := regex.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, regex.DOTALL):
        text = fenced[1]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _holds(found: Any, expected: Any) -> bool:
    """Whether the expected keys have the expected values; there may be others. Numbers are equal as numbers, 1 and 1.0
    too, and never equal to true or false.
    """
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and _holds(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_holds, found, expected))
    return isinstance(found, bool) == isinstance(expected, bool) and bool(found == expected)


def _same_sql(text: str, expected: str) -> bool:
    found = parse_sql(text)
    return found is not None and found == parse_sql(expected)
