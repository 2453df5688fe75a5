"""A tiny chat model with a real tokenizer, which has learnt some answers by heart."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import tiny

SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")
CHARACTERS = string.ascii_lowercase + string.digits + " .,=+-*'\"{}:;()<>?!_"
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LEARNT = (
    ("hi", "hello"),
    ("2+2", "4"),
    ("name", '{"name": "ann"}'),
    ("all", "select a from t"),
    ("sky", "it is blue."),
)
"""Prompt and answer."""


def write_chat(folder: Path, *, learnt: Sequence[tuple[str, str]] = LEARNT, template: bool = True) -> Path:
    """The model, in float32, and its tokenizer: one token a character."""
    tokenizer = _tokenizer(template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _learn(model, tokenizer, learnt)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chat_root(root: Path) -> Path:
    """The model (``chat``), two adapters on it that change little (``one``, ``two``), and a task for each."""
    write_chat(root / "chat")
    for seed, name in enumerate(("one", "two"), start=1):
        tiny.write_lora(root / "chat", root / name, rank=2, seed=seed)
    for name, pairs in (("first", LEARNT[:3]), ("second", LEARNT[3:])):
        rows = [{"messages": [{"role": "user", "content": ask}], "answer": answer} for ask, answer in pairs]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _tokenizer(template: bool) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<pad>", extra_special_tokens=["<user>", "<assistant>"]
    )
    wrapped.chat_template = TEMPLATE if template else None
    return wrapped


def _learn(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> None:
    texts = [f"<user>{prompt}<end><assistant>{answer}<end>" for prompt, answer in pairs]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
