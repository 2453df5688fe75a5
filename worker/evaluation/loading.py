"""A checkpoint from a folder, as it is scored: by transformers, from local files alone, and no code of the model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import MergeyardError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A causal language model on its device in the type of its files, and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def context(self) -> int | None:
        """The most tokens that the model can look at, where its config says so."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(length := getattr(config, name, None), int) and length > 0:
                return length
        return None


@contextlib.contextmanager
def loaded(folder: Path, device: str) -> Iterator[Loaded]:
    """The model in ``folder`` for as long as the block lasts, on ``device`` (``cpu``, ``cuda``).

    Raises:
        MergeyardError: `not_supported` (no transformers here, or none that knows this model as a causal language
            model), `tokenizer_invalid`, `out_of_memory`.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (seconds, and not every worker)
        from transformers.utils import logging as quiet  # noqa: PLC0415
    except ImportError:
        message = "This worker cannot score models: transformers is missing (pip install 'mergeyard[evaluation]')."
        raise MergeyardError("not_supported", message) from None
    quiet.disable_progress_bar()  # type: ignore[no-untyped-call]
    only_here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **only_here)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"transformers cannot load the model's tokenizer: {_first_line(error)}"
        raise MergeyardError("tokenizer_invalid", message) from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **only_here)
    except (ValueError, KeyError, TypeError, OSError) as error:
        message = f"transformers cannot load this as a causal language model: {_first_line(error)}"
        raise MergeyardError("not_supported", message) from None
    try:
        yield Loaded(model.to(device).eval(), tokenizer)
    finally:
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
