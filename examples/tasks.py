"""The two tasks of the demo, as data: a request → SQL, a text → JSON.

Everything is generated from fixed seeds, so the same examples come out on every machine. An answer is a deterministic
function of its prompt (one canonical SQL, one canonical JSON), which makes exact match a fair measure. Training,
validation and test share no literal value, no table, no frame and no wording; validation is for choices (the
density), the test for the figures that are reported.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from examples.json_extraction import HELD_OUT_KEYS, extraction
from examples.sql_requests import sql_request
from examples.vocabulary import Split

Task = Literal["sql", "json"]
TASKS: tuple[Task, ...] = get_args(Task)

SIZES: Mapping[Split, int] = {"train": 12_000, "validation": 200, "test": 200}
"""Examples a task."""

SEED = 20260


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer; `kind` names the shape of query or text, for reading the scores."""

    task: Task
    kind: str
    prompt: str
    answer: str


ARTICLE: tuple[Example, ...] = (
    Example(
        "sql",
        "article",
        "Generate a SQL query to find the names of all employees in the 'Sales' department.",
        "SELECT name FROM employees WHERE department = 'Sales';",
    ),
    Example(
        "json",
        "article",
        "Extract the name and age from the following text: 'John Doe is 42 years old.' "
        "Format the output as JSON with keys 'name' and 'age'.",
        '{"name": "John Doe", "age": 42}',
    ),
)
"""The two generations the article asks for. Nothing of them may be in training or validation: see `article_leaks`."""


def examples(task: Task, split: Split, count: int | None = None) -> list[Example]:
    """The first `count` examples of a split (all by default), prompts unique."""
    wanted = SIZES[split] if count is None else count
    rng = random.Random(f"{SEED}/{task}/{split}")
    make = sql_request if task == "sql" else extraction
    found: dict[str, Example] = {}
    while len(found) < wanted:
        kind, prompt, answer = make(rng, split)
        found.setdefault(prompt, Example(task, kind, prompt, answer))
    return list(found.values())


ARTICLE_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "the value 'Sales'": re.compile("sales", re.IGNORECASE),
    "the table of employees": re.compile("employee", re.IGNORECASE),
    "the column department": re.compile("department", re.IGNORECASE),
    "the name John": re.compile("john", re.IGNORECASE),
    "the name Doe": re.compile(r"\bdoe\b", re.IGNORECASE),
    "the number 42": re.compile(r"(?<!\d)42(?!\d)"),
    "the article's SQL frame": re.compile(r"^Generate a SQL query to find the .* of all .* in the '", re.IGNORECASE),
    "the article's JSON frame": re.compile(
        r"^Extract the .* from the following text: '.*Format the output", re.IGNORECASE
    ),
    "the article's sentence": re.compile(r"'[\w ]+ is \d+ years old\.'"),
}


def article_leaks(example: Example) -> list[str]:
    """What of the article's two prompts, and of the names and values in them, an example gives away."""
    text = f"{example.prompt}\n{example.answer}"
    leaks = [what for what, pattern in ARTICLE_PATTERNS.items() if pattern.search(text)]
    if example.task == "json" and frozenset(re.findall(r'"(\w+)": ', example.answer)) == HELD_OUT_KEYS:
        leaks.append("the article's keys, name and age, together")
    return leaks
