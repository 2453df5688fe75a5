"""The metrics that judge texts."""

from __future__ import annotations

from typing import Any

import pytest

from app.tasks.judging import is_right, parse_sql
from app.tasks.task import Example, Metric

SALES = "SELECT name FROM employees WHERE department = 'Sales';"


def judged(text: str, answer: Any, metric: Metric) -> bool:
    return is_right(text, Example(line=1, prompt="?", messages=(), answer=answer), metric)


@pytest.mark.parametrize(
    ("metric", "text", "answer", "right"),
    [
        ("contains", "The answer is 42.", "42", True),
        ("contains", "The answer is 41.", "42", False),
        ("regex", "It is 42.", r"\b4\d\b", True),
        ("regex", "It is 142.", r"\b4\d\b", False),
        ("json", '{"name": "Ann", "age": 42}', {"age": 42, "name": "Ann"}, True),
        ("json", ' {"age": 42.0, "name": "Ann", "more": []}\n', {"age": 42, "name": "Ann"}, True),
        ("json", '```json\n{"age": 42}\n```', {"age": 42}, True),
        ("json", '{"age": "42"}', {"age": 42}, False),
        ("json", '{"age": true}', {"age": 1}, False),
        ("json", '{"a": {"b": [1, {"c": null}]}}', {"a": {"b": [1, {"c": None}]}}, True),
        ("json", '{"a": [1, 2]}', {"a": [2, 1]}, False),
        ("json", '{"a": [1]}', {"a": [1, 2]}, False),
        ("json", '{"name": "Ann"}', {"name": "Ann", "age": None}, False),
        ("json", 'Sure: {"age": 42}', {"age": 42}, False),
        ("json", "[" * 5000, {"age": 42}, False),
        ("sql", "select NAME\nfrom Employees where (department = 'Sales')", SALES, True),
        ("sql", "SELECT name FROM employees WHERE department = 'sales';", SALES, False),
        ("sql", "SELECT name FROM employees WHERE NOT (NOT a = 1)", "SELECT name FROM employees WHERE a = 1", True),
        ("sql", "SELECT name, age FROM employees", "SELECT name FROM employees", False),
        ("sql", "SELECT name FROM employees; DROP TABLE employees", "SELECT name FROM employees", False),
        ("sql", "I think that it is this.", "SELECT name FROM employees", False),
        ("sql", "", "SELECT name FROM employees", False),
        ("sql", "SELECT " + "(" * 3000, "SELECT name FROM employees", False),
    ],
)  # fmt: skip
def test_what_is_right(metric: Metric, text: str, answer: Any, right: bool) -> None:
    assert judged(text, answer, metric) is right


def test_a_pattern_that_takes_for_ever_finds_nothing() -> None:
    assert not judged("a" * 60 + "!", r"(?:a|aa)+$", "regex")


@pytest.mark.parametrize("text", ["name", "42", "'Sales'", "name AS n", "hello world", ""])
def test_what_is_no_statement_is_no_sql(text: str) -> None:
    assert parse_sql(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "DELETE FROM t WHERE a = 1",
        "INSERT INTO t VALUES (1)",
        "UPDATE t SET a = 1",
        "WITH x AS (SELECT 1) SELECT * FROM x",
    ],
)
def test_any_statement_is_sql(text: str) -> None:
    assert parse_sql(text) is not None
