"""Examples as token ids, and the one forward pass that training and scoring share.

A prompt is rendered as a user of the merged model would render it: one user message through the tokenizer's chat
template, generation prompt added. The template puts the same system message before every prompt; its keys and values
are computed once a batch (or once a model, when scoring) and shared by all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from examples.tasks import Example


@dataclass(frozen=True)
class Rendered:
    """One example: `prompt` without the shared prefix, `answer` with the end-of-turn token."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class RenderedSet:
    """Examples in their given order, and the token ids that every one of them starts with."""

    prefix: list[int]
    examples: list[Rendered]


def render(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> RenderedSet:
    prompts = [prompt_ids(tokenizer, example.prompt) for example in examples]
    answers = [
        tokenizer(example.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for example in examples
    ]
    shared = _shared_length([*prompts, prompt_ids(tokenizer, "?")])
    return RenderedSet(
        prompts[0][:shared],
        [Rendered(prompt[shared:], answer) for prompt, answer in zip(prompts, answers, strict=True)],
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts have in common."""
    different = (position for position, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    return next(different, min(map(len, prompts)))


def batches_by_length(rendered: Sequence[Rendered], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, neighbours in length, so that little padding is computed."""
    order = sorted(range(len(rendered)), key=lambda index: rendered[index].length)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def prefix_cache(model: PreTrainedModel, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of the prefix, for a batch of one; gradients flow through them."""
    cache: DynamicCache = model.model(input_ids=torch.tensor([list(prefix)]), use_cache=True).past_key_values
    return cache


def answer_logits(
    model: PreTrainedModel, cache: DynamicCache, batch: Sequence[Rendered]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher-forced logits of the answer tokens alone, the vocabulary being a fifth of this model's arithmetic.

    Returns logits (N, vocabulary), the tokens they should predict (N) and the row of the batch each belongs to (N).
    """
    width = max(example.length for example in batch) - 1
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(batch):
        # Padding comes last, where a causal model cannot see it: no mask is needed.
        ids = (example.prompt + example.answer)[:-1]
        tokens[row, : len(ids)] = torch.tensor(ids)
        rows += [row] * len(example.answer)
        columns += range(len(example.prompt) - 1, len(example.prompt) - 1 + len(example.answer))
        targets += example.answer
    hidden = model.model(input_ids=tokens, past_key_values=_repeated(cache, len(batch))).last_hidden_state
    row_index = torch.tensor(rows)
    return model.lm_head(hidden[row_index, torch.tensor(columns)]), torch.tensor(targets), row_index


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a one-row cache for `rows` rows; the original is not grown by what follows it."""
    layers: list[Any] = cache.layers
    return DynamicCache(
        [tuple(part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values)) for layer in layers]
    )
