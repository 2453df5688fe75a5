"""A task file, JSONL: one example a line, in UTF-8. Everything wrong with it has its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import regex

from app import strict_json
from app.errors import MergeyardError
from app.tasks.judging import parse_sql
from app.tasks.task import Example, Message, Metric

MAX_BYTES = 50_000_000
MAX_LINE = 1_000_000  # characters
MAX_EXAMPLES = 20_000  # every expected query is parsed as it is submitted
MAX_CHOICES = 100
MAX_PATTERN = 1_000  # characters
ROLES = frozenset({"system", "user", "assistant"})


def read_examples(content: bytes, *, name: str, metric: Metric, limit: int | None = None) -> tuple[Example, ...]:
    """The first ``limit`` examples (all: None) of a file called ``name``, as ``metric`` needs them.

    Other fields of a line than ``prompt``, ``messages``, ``answer`` and ``choices`` are the author's and are passed
    over. All lines are checked, those beyond the limit too.

    Raises:
        MergeyardError: `task_invalid`: an empty file, too large a one, a line that is no JSON object, a field that is
            missing, of another type or unknown to the metric, an expected answer that the metric cannot judge by.
    """
    examples = [_example(value, name, number, metric) for number, value in _objects(content, name)]
    if not examples:
        raise _wrong(name, None, "has no examples; write one JSON object a line")
    return tuple(examples[:limit])


def check_lines(content: bytes, *, name: str) -> None:
    """Whether it may be a task file, for whichever metric. Raises ``task_invalid``."""
    if not list(_objects(content, name)):
        raise _wrong(name, None, "has no examples; write one JSON object a line")


def _objects(content: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line that is not empty, with its number. Raises ``task_invalid``."""
    if len(content) > MAX_BYTES:
        raise _wrong(name, None, f"has more than {MAX_BYTES} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise _wrong(name, None, "is not UTF-8 text") from None
    count = 0
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        count += 1
        if len(line) > MAX_LINE:
            raise _wrong(name, number, f"has more than {MAX_LINE} characters")
        if count > MAX_EXAMPLES:
            raise _wrong(name, number, f"is one example too many: at most {MAX_EXAMPLES} are taken")
        try:
            value = strict_json.loads(line)
        except ValueError as error:
            raise _wrong(name, number, f"is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise _wrong(name, number, "is not a JSON object")
        yield number, value


def _example(value: Mapping[str, Any], name: str, number: int, metric: Metric) -> Example:
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise _wrong(name, number, "has to have either `prompt` or `messages`")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise _wrong(name, number, "has a `prompt` that is not a text")
    if "answer" not in value:
        raise _wrong(name, number, "has no `answer`, the expected one")
    choices = _choices(value, name, number, metric)
    _check_answer(value["answer"], choices, name, number, metric)
    return Example(
        line=number,
        prompt=prompt,
        messages=() if messages is None else _messages(messages, name, number),
        answer=value["answer"],
        choices=choices,
    )


def _messages(value: Any, name: str, number: int) -> tuple[Message, ...]:
    """Raises ``task_invalid`` unless it is a conversation that the model has to go on with."""
    if not isinstance(value, list) or not value:
        raise _wrong(name, number, "has `messages` that are not a list of messages")
    found = []
    for item in value:
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise _wrong(
                name, number, f"has a message without `content`, or a `role` not of {', '.join(sorted(ROLES))}"
            )
        found.append(Message(role=str(role), content=content))
    if found[-1].role != "user":
        raise _wrong(name, number, "has `messages` that do not end with the user's: what follows is the answer")
    return tuple(found)


def _choices(value: Mapping[str, Any], name: str, number: int, metric: Metric) -> tuple[str, ...]:
    choices = value.get("choices")
    if (choices is not None) != (metric == "multiple_choice"):
        lacking = "has no `choices`" if choices is None else "has `choices`"
        raise _wrong(name, number, f"{lacking}, which does not fit the metric {metric}")
    if choices is None:
        return ()
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or not 2 <= len(choices) <= MAX_CHOICES or len(set(choices)) < len(choices):
        raise _wrong(name, number, f"has `choices` that are not 2 to {MAX_CHOICES} different texts")
    return tuple(choices)


def _check_answer(answer: Any, choices: Sequence[str], name: str, number: int, metric: Metric) -> None:
    """Raises ``task_invalid`` where the metric cannot judge by it."""
    if metric == "multiple_choice":
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise _wrong(name, number, f"has an `answer` that is not the index of a choice, 0 to {len(choices) - 1}")
        return
    if metric == "json":
        if not isinstance(answer, dict):
            raise _wrong(name, number, "has an `answer` that is not an object; the metric json compares its keys")
        return
    if not isinstance(answer, str) or not answer:
        raise _wrong(name, number, f"has an `answer` that is not a text, which the metric {metric} needs")
    if metric == "regex":
        if len(answer) > MAX_PATTERN:
            raise _wrong(name, number, f"has a pattern of more than {MAX_PATTERN} characters")
        try:
            regex.compile(answer)
        except regex.error as error:
            raise _wrong(name, number, f"has an `answer` that is no regular expression: {error}") from None
    if metric == "sql" and parse_sql(answer) is None:
        raise _wrong(name, number, "has an `answer` that is not SQL")


def _wrong(name: str, number: int | None, what: str) -> MergeyardError:
    place = name if number is None else f"Line {number} of {name}"
    return MergeyardError("task_invalid", f"{place} {what}.")
