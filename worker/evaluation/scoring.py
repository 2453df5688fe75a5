"""A loaded model's score on a task: deterministic, in batches, with bounded memory.

Greedy decoding writes exactly an expected answer if and only if, fed the prompt and that answer, the model puts every
next token of it first. So exact match takes one forward pass for each example, as likelihoods do; only texts that are
judged as texts are written token by token. What is measured by exact match is the answer in its canonical tokens: a
model that spelt the same characters with other tokens would count as wrong. In 16 bits a batch is rounded differently
from a single prompt, which now and then tips a near tie.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from app.tasks.judging import is_right
from app.tasks.task import FORCED, Task, TaskScore
from worker.evaluation.loading import Loaded
from worker.evaluation.rendering import Asked, batches, ends, render

BATCH_TOKENS = 4096  # padded, of one forward pass
LOGIT_BYTES = 256 << 20  # of the float32 logits that are looked at, at once
ROWS = 64  # that are written at once

OnProgress = Callable[[int, int], None]


@torch.inference_mode()
def score(
    loaded: Loaded,
    task: Task,
    *,
    on_progress: OnProgress = lambda _done, _total: None,
    check: Callable[[], None] = lambda: None,
) -> TaskScore:
    """Score ``loaded`` on ``task``. ``on_progress`` is told the prompts done and those in all; ``check`` may raise.

    The same model, task and machine give the same score. Raises MergeyardError as ``render`` does.
    """
    asked = render(loaded, task)
    done = 0
    found: dict[tuple[int, int], _Seen] = {}
    for batch in batches(asked, BATCH_TOKENS):
        for rows in _bounded(loaded, batch, task):
            check()
            seen = _look(loaded, rows) if task.metric in FORCED else _write(loaded, rows, task)
            found |= {(row.index, row.choice): one for row, one in zip(rows, seen, strict=True)}
            done += len(rows)
            on_progress(done, len(asked))
    return _summed(task, found)


class _Seen:
    """Of one way to go on: the log-likelihood of its answer in nats, its tokens, and whether it is right."""

    __slots__ = ("likelihood", "right", "tokens")

    def __init__(self, likelihood: float, tokens: int, right: bool) -> None:
        self.likelihood, self.tokens, self.right = likelihood, tokens, right


def _bounded(loaded: Loaded, batch: Sequence[Asked], task: Task) -> list[Sequence[Asked]]:
    """The batch in parts whose logits, or whose answers, fit at once."""
    if task.metric in FORCED:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        first = min(len(row.prompt) for row in batch) - 1
        width = max(row.length for row in batch) - first
        size = max(1, LOGIT_BYTES // (4 * vocabulary * width))
    else:
        size = ROWS
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _look(loaded: Loaded, rows: Sequence[Asked]) -> list[_Seen]:
    """Teacher-forced: what the model thinks of the answers that it is shown.

    Padding comes last, where a causal model cannot see it: no mask is needed.
    """
    width = max(row.length for row in rows) - 1
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids = (*row.prompt, *row.answer)[:-1]
        tokens[number, : len(ids)] = torch.tensor(ids)
    first = min(len(row.prompt) for row in rows) - 1  # the logits there predict the first token of an answer
    logits = _logits(loaded.model, tokens.to(loaded.device), first)
    seen = []
    for number, row in enumerate(rows):
        start = len(row.prompt) - 1 - first
        own = logits[number, start : start + len(row.answer)].float()
        wanted = torch.tensor(row.answer, device=own.device)
        likely = torch.log_softmax(own, dim=-1).gather(1, wanted[:, None])
        right = bool((own.argmax(dim=-1) == wanted).all())
        seen.append(_Seen(float(likely.sum(dtype=torch.float64)), len(row.answer), right))
    return seen


def _logits(model: Any, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """(rows, positions from ``first`` on, vocabulary). Those before are not made where the model can leave them out."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = torch.arange(first, tokens.shape[1], device=tokens.device)
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits
        return logits
    every: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return every[:, first:]


def _write(loaded: Loaded, rows: Sequence[Asked], task: Task) -> list[_Seen]:
    """What the model writes by itself, greedily, judged as a text."""
    width = max(len(row.prompt) for row in rows)
    stops = ends(loaded)
    padding = loaded.tokenizer.pad_token_id
    padding = padding if padding is not None else min(stops, default=0)
    tokens = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):  # padding comes first: what is written follows the prompt
        tokens[number, width - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[number, width - len(row.prompt) :] = 1
    written = loaded.model.generate(
        tokens.to(loaded.device),
        attention_mask=mask.to(loaded.device),
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=task.max_new_tokens,
        pad_token_id=padding,
        eos_token_id=sorted(stops) or None,
    )
    seen = []
    for row, ids in zip(rows, written[:, width:].tolist(), strict=True):
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        text = loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)
        right = is_right(text, task.examples[row.index], task.metric)
        seen.append(_Seen(0.0, end, right))
    return seen


def _summed(task: Task, found: dict[tuple[int, int], _Seen]) -> TaskScore:
    count = len(task.examples)
    if task.metric == "nll":
        each = [found[index, 0] for index in range(count)]
        tokens = sum(one.tokens for one in each)
        mean = -sum(one.likelihood for one in each) / tokens
        # of a ratio of sums, by linearisation; examples are independent, tokens of one are not
        spread = math.fsum((-one.likelihood - mean * one.tokens) ** 2 for one in each)
        error = math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else 0.0
    else:
        right = [_is_right(task, found, index) for index in range(count)]
        mean = sum(right) / count
        error = math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else 0.0
    return TaskScore(name=task.name, metric=task.metric, score=mean, standard_error=error, examples=count)


def _is_right(task: Task, found: dict[tuple[int, int], _Seen], index: int) -> bool:
    if task.metric != "multiple_choice":
        return found[index, 0].right
    example = task.examples[index]
    likely = [found[index, choice].likelihood for choice in range(len(example.choices))]
    return bool(likely.index(max(likely)) == example.answer)
