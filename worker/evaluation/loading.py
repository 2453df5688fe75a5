"""A checkpoint from a folder, as it is scored: by transformers, from local files alone, and no code of the model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
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
    transformers = _transformers()
    tokenizer = _tokenizer(transformers, folder)
    with _as_language_model():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, **_ONLY_HERE
        )
    try:
        yield Loaded(model.to(device).eval(), tokenizer)
    finally:
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def empty_model(folder: Path, device: str) -> Loaded:
    """The model that ``folder`` has the config and the tokenizer of, its weights anything. Raises as ``loaded``."""
    transformers = _transformers()
    tokenizer = _tokenizer(transformers, folder)
    with _as_language_model():
        config: Any = transformers.AutoConfig.from_pretrained(folder, **_ONLY_HERE)
        dtype = getattr(config, "dtype", None) or torch.float32
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return Loaded(model.to(device).eval(), tokenizer)


_ONLY_HERE: Mapping[str, Any] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 (seconds, and not every worker)
        from transformers.utils import logging as quiet  # noqa: PLC0415
    except ImportError:
        message = "Models cannot be scored here: transformers is missing (pip install 'mergeyard[evaluation]')."
        raise MergeyardError("not_supported", message) from None
    quiet.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_ONLY_HERE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"transformers cannot load the model's tokenizer: {_first_line(error)}"
        raise MergeyardError("tokenizer_invalid", message) from None


@contextlib.contextmanager
def _as_language_model() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        message = f"transformers cannot load this as a causal language model: {_first_line(error)}"
        raise MergeyardError("not_supported", message) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
