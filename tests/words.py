"""Small real tokenizers, and tiny Llamas that speak their vocabularies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "select name from table where id"]
START, END, USER, TOOL = "<s>", "</s>", "<|user|>", "<|tool|>"
KINDS = ("bpe", "wordpiece", "unigram")


def tokenizer(kind: str = "bpe", extra: Sequence[str] = (), size: int = 280) -> PreTrainedTokenizerFast:
    """A tokenizer trained on TEXTS, with ``extra`` special tokens added after it."""
    made = Tokenizer.from_str(_trained(kind, size))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, eos_token=END, unk_token="<unk>")
    fast.add_tokens(list(extra), special_tokens=True)
    return fast


@functools.cache  # two trainings need not give the same vocabulary
def _trained(kind: str, size: int) -> str:
    special = [START, END, "<unk>"]
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(TEXTS * 20, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, made.token_to_id(START))]
    )
    return str(made.to_str())


def write_speaker(
    folder: Path,
    words: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    tied: bool = False,
    spare: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Llama of random weights with a row for each token and ``spare`` more, and its tokenizer beside it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words) + spare,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
