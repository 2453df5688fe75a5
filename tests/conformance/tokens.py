"""Tokenizers of a dozen one-letter tokens whose vocabularies overlap, for the cases that merge vocabularies.

``words`` is the base's. ``words-more`` has all of it in another order, and two tokens besides; ``words-other`` lacks
two of the base's, shares one new token with ``words-more`` and has one that no other has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``tokens`` in the order of their ids; those in angle brackets are added tokens."""

    tokens: tuple[str, ...]


TOKENIZERS: Mapping[str, Vocabulary] = {
    "words": Vocabulary(("<s>", *"abcdefghijk")),
    "words-more": Vocabulary(("<s>", *"bacedfhgikjx", "<extra>")),
    "words-other": Vocabulary(("<s>", *"abcdefghixy")),
}


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, Mapping[str, Any]]:
    """tokenizer.json and tokenizer_config.json, by name: byte-pair encoding without a merge."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    added = [token for token in vocabulary.tokens if token.startswith("<")]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in added
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
