"""Exact match of greedy answers, without generating them.

Greedy decoding writes exactly the expected answer if and only if, fed the prompt and the expected answer, the model
puts every next token of it first, the end-of-turn token included. So one forward pass over prompt and answer decides
each example, and a score over 200 examples takes seconds. What is measured is the expected answer in its canonical
tokenisation: a model that spelt the same characters with other tokens would count as wrong, which a trained one has no
reason to do. And bfloat16 rounds a batch differently from a single prompt, which now and then tips a near tie.
`agreement` holds the shortcut against real generation; `python -m examples.scoring MODEL` shows both.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.rendering import answer_logits, batches_by_length, prefix_cache, prompt_ids, render
from examples.tasks import TASKS, Example, examples

BATCH = 40


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a plain checkpoint, bfloat16, from local files alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def exact_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Example],
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[bool]:
    """For each example, whether the greedy answer is the expected one; `on_progress` gets the number just done."""
    rendered = render(tokenizer, asked)
    cache = prefix_cache(model, rendered.prefix)
    matches = [False] * len(asked)
    for indices in batches_by_length(rendered.examples, BATCH):
        logits, expected, rows = answer_logits(model, cache, [rendered.examples[index] for index in indices])
        wrong = set(rows[logits.argmax(dim=-1) != expected].tolist())
        for row, index in enumerate(indices):
            matches[index] = row not in wrong
        on_progress(len(indices))
    return matches


def exact_match(matches: Sequence[bool]) -> float:
    return sum(matches) / len(matches)


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 96) -> str:
    """The greedy answer, as any user of the model would get it."""
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    generator: Any = model  # typed by transformers as a tensor or a module
    output = generator.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Example]) -> int:
    """On how many examples the shortcut and real generation say the same."""
    matches = exact_matches(model, tokenizer, asked)
    return sum(
        match == (generate(model, tokenizer, example.prompt) == example.answer)
        for match, example in zip(matches, asked, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sample", type=int, default=20, help="examples a task to generate for real")
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    for task in TASKS:
        held_out = examples(task, "test")
        score = exact_match(exact_matches(model, tokenizer, held_out))
        agreed = agreement(model, tokenizer, held_out[: options.sample])
        print(f"{task}: exact match {score:.1%} of {len(held_out)}; generation agrees on {agreed} of {options.sample}")


if __name__ == "__main__":
    main()
