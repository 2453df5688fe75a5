"""Task files: what is read of them, and every way they can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.errors import MergeyardError
from app.tasks.reading import check_lines, read_examples
from app.tasks.shipped import NAMES, shipped
from app.tasks.task import Metric


def lines(*values: Any) -> bytes:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode()


GOOD = {"prompt": "2+2=", "answer": "4"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "answer": "4"}
CHOICE = {"prompt": "The sky is", "choices": [" blue", " green"], "answer": 0}


def test_examples_in_order_with_their_lines() -> None:
    content = lines(GOOD, {**CHAT, "author": "passed over"}) + b"\r\n\n" + lines({"prompt": "a\u2028b", "answer": "c"})
    first, second, third = read_examples(content, name="x.jsonl", metric="exact_match")
    assert (first.line, first.prompt, first.messages, first.answer) == (1, "2+2=", (), "4")
    assert (second.line, second.prompt) == (2, None)
    assert [(message.role, message.content) for message in second.messages] == [
        ("system", "Be brief."),
        ("user", "2+2?"),
    ]
    assert (third.line, third.prompt) == (4, "a\u2028b")


def test_a_limit_takes_the_first_and_checks_all() -> None:
    assert len(read_examples(lines(GOOD, GOOD, GOOD), name="x", metric="nll", limit=2)) == 2
    with pytest.raises(MergeyardError, match="Line 2 of x"):
        read_examples(lines(GOOD, {}), name="x", metric="nll", limit=1)


@pytest.mark.parametrize(
    ("metric", "content", "says"),
    [
        ("nll", b"", "x has no examples"),
        ("nll", b"\n \n", "x has no examples"),
        ("nll", b"\xff", "x is not UTF-8"),
        ("nll", b"{", "Line 1 of x is not JSON"),
        ("nll", b'{"prompt": NaN}', "Line 1 of x is not JSON"),
        ("nll", lines(GOOD, [1]), "Line 2 of x is not a JSON object"),
        ("nll", lines({"answer": "4"}), "either `prompt` or `messages`"),
        ("nll", lines({**GOOD, **CHAT}), "either `prompt` or `messages`"),
        ("nll", lines({"prompt": "", "answer": "4"}), "`prompt` that is not a text"),
        ("nll", lines({"prompt": 1, "answer": "4"}), "`prompt` that is not a text"),
        ("nll", lines(GOOD, {"prompt": "2+2="}), "Line 2 of x has no `answer`"),
        ("nll", lines({"prompt": "2+2=", "answer": 4}), "which the metric nll needs"),
        ("exact_match", lines({"prompt": "2+2=", "answer": ""}), "which the metric exact_match needs"),
        ("exact_match", lines(CHOICE), "which does not fit the metric exact_match"),
        ("multiple_choice", lines(GOOD), "has no `choices`, which does not fit"),
        ("multiple_choice", lines({**CHOICE, "answer": 2}), "index of a choice, 0 to 1"),
        ("multiple_choice", lines({**CHOICE, "answer": True}), "index of a choice"),
        ("multiple_choice", lines({**CHOICE, "answer": "blue"}), "index of a choice"),
        ("multiple_choice", lines({**CHOICE, "choices": ["a"], "answer": 0}), "2 to 100 different texts"),
        ("multiple_choice", lines({**CHOICE, "choices": ["a", "a"]}), "2 to 100 different texts"),
        ("json", lines({"prompt": "x", "answer": '{"a": 1}'}), "compares its keys"),
        ("regex", lines({"prompt": "x", "answer": "(a"}), "no regular expression"),
        ("regex", lines({"prompt": "x", "answer": "a" * 1001}), "more than 1000 characters"),
        ("sql", lines({"prompt": "x", "answer": "no query at all"}), "not SQL"),
        ("nll", lines({"messages": [], "answer": "4"}), "not a list of messages"),
        ("nll", lines({"messages": [{"role": "user"}], "answer": "4"}), "a message without `content`"),
        ("nll", lines({"messages": [{"role": "tool", "content": ""}], "answer": "4"}), "or a `role` not of"),
        ("nll", lines({"messages": [{"role": "assistant", "content": "4"}], "answer": "4"}), "end with the user's"),
        ("nll", lines({"prompt": "x" * 1_000_001, "answer": "4"}), "more than 1000000 characters"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(metric: Metric, content: bytes, says: str) -> None:
    with pytest.raises(MergeyardError) as refused:
        read_examples(content, name="x", metric=metric)
    assert refused.value.code == "task_invalid" and says in refused.value.message


def test_too_many_examples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.tasks.reading.MAX_EXAMPLES", 2)
    read_examples(lines(GOOD, GOOD), name="x", metric="nll")
    with pytest.raises(MergeyardError, match="Line 3 of x is one example too many"):
        read_examples(lines(GOOD, GOOD, GOOD), name="x", metric="nll")


def test_an_upload_is_checked_for_whichever_metric() -> None:
    check_lines(lines(GOOD, CHOICE), name="x")
    for content in (b"", b"[]", b"{}\n{"):
        with pytest.raises(MergeyardError):
            check_lines(content, name="x")


@pytest.mark.parametrize(("name", "metric"), list(zip(NAMES, ("json", "sql"), strict=True)))
def test_what_is_shipped_can_be_used(name: str, metric: Metric) -> None:
    assert len(read_examples(shipped(name), name=name, metric=metric)) == 1
    with pytest.raises(MergeyardError, match="there are shipped:article-json"):
        shipped("../errors")
