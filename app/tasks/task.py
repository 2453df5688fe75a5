"""A task as a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Metric = Literal["exact_match", "contains", "regex", "json", "sql", "multiple_choice", "nll"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# Of those that are judged without a word from the model: the expected answer is fed to it, and its probabilities read.
FORCED: frozenset[Metric] = frozenset({"exact_match", "multiple_choice", "nll"})
# Of the others the model writes an answer, greedily, and that is judged as text.
LOWER_IS_BETTER: frozenset[Metric] = frozenset({"nll"})

DESCRIPTIONS: Mapping[Metric, str] = {
    "exact_match": "the greedy answer is the expected one to the token, its end included",
    "contains": "the expected text is in the answer",
    "regex": "the expected pattern is found in the answer",
    "json": "the answer is JSON in which the expected keys have the expected values",
    "sql": "the answer is SQL that says the same as the expected one",
    "multiple_choice": "of the choices the right one is the most likely",
    "nll": "negative log-likelihood of the expected answer, nats a token (lower is better)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question. Either ``prompt`` (a text that the answer follows) or ``messages`` (through the chat template).

    ``answer`` is what is expected: a text, the index of the right one of ``choices``, or for ``json`` a mapping.
    ``line`` is where it stands in its file, from 1.
    """

    line: int
    prompt: str | None
    messages: tuple[Message, ...]
    answer: Any
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Examples of one kind and how their answers are judged. At most ``max_new_tokens`` are written for one answer."""

    name: str
    metric: Metric
    examples: tuple[Example, ...]
    max_new_tokens: int

    @property
    def chats(self) -> bool:
        """Whether a chat template is needed."""
        return any(example.messages for example in self.examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """What a model reached: the mean over ``examples``, and its ``standard_error``.

    Between 0 and 1, but for ``nll``: there nats a token, over all tokens of all answers.
    """

    name: str
    metric: Metric
    score: float
    standard_error: float
    examples: int
