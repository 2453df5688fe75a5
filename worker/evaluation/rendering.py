"""Examples as token ids: what the model is shown, and what it should go on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import MergeyardError
from app.tasks.task import FORCED, Example, Task
from worker.evaluation.loading import Loaded


@dataclass(frozen=True, slots=True)
class Asked:
    """One way to go on: example ``index`` of the task, its ``prompt`` and the ``answer`` to be looked at, as ids.

    ``choice`` tells the ways of one example apart. ``answer`` is empty where the model writes it.
    """

    index: int
    choice: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def render(loaded: Loaded, task: Task) -> list[Asked]:
    """Every example of the task, in order; of multiple choice each choice by itself.

    A prompt is tokenised as a user of the model would do it: through the chat template with the generation prompt, or
    as a text with the special tokens that the tokenizer puts before one. An answer follows without any. Where it is to
    be the whole answer (exact match), the end-of-turn token is part of it.

    Raises MergeyardError `task_too_long` (with the line), `chat_template_missing`.
    """
    asked = []
    for index, example in enumerate(task.examples):
        prompt = tuple(_prompt(loaded.tokenizer, example))
        for choice, text in enumerate(_answers(example, task)):
            answer = tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
            if task.metric == "exact_match":
                answer = (*answer, *_end(loaded))
            asked.append(Asked(index, choice, prompt, answer))
            _check_length(loaded, task, example, asked[-1])
    return asked


def batches(asked: Sequence[Asked], tokens: int) -> Iterator[list[Asked]]:
    """Neighbours in length together, at most ``tokens`` padded tokens at once, and always one. The order is fixed."""
    batch: list[Asked] = []
    for one in sorted(asked, key=lambda one: (one.length, one.index, one.choice)):
        if batch and one.length * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def ends(loaded: Loaded) -> frozenset[int]:
    """The tokens any of which ends an answer."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*found, loaded.tokenizer.eos_token_id) if isinstance(token, int))


def _answers(example: Example, task: Task) -> Sequence[str]:
    if task.metric == "multiple_choice":
        return example.choices
    return (str(example.answer),) if task.metric in FORCED else ("",)


def _prompt(tokenizer: Any, example: Example) -> Sequence[int]:
    if example.prompt is not None:
        return list(tokenizer(example.prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise MergeyardError("chat_template_missing", "The task has `messages`, and the tokenizer no chat template.")
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(loaded: Loaded) -> tuple[int, ...]:
    token = loaded.tokenizer.eos_token_id
    return () if token is None else (token,)


def _check_length(loaded: Loaded, task: Task, example: Example, asked: Asked) -> None:
    wanted = asked.length + (0 if task.metric in FORCED else task.max_new_tokens)
    if loaded.context is not None and wanted > loaded.context:
        message = (
            f"Line {example.line} of the task {task.name} takes {wanted} tokens with its answer; the model looks at "
            f"{loaded.context} at most. Shorten the prompt, or lower max_new_tokens."
        )
        raise MergeyardError("task_too_long", message)
    if not asked.prompt:
        raise MergeyardError("task_invalid", f"Line {example.line} of the task {task.name} has a prompt of no tokens.")
