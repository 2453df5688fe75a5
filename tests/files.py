"""Tiny models and adapters written by hand, for tests that care about files and not about arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN = 8
MODULES = ("self_attn.q_proj", "mlp.up_proj")


def llama_tensors(layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors named as Llama's, of shape (8, 8), (16, 8) and (8,)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(16, HIDDEN), "model.norm.weight": random(HIDDEN)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = random(2 * HIDDEN, HIDDEN)
    return tensors


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A single-file model folder; ``config`` adds to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors if tensors is not None else llama_tensors()), folder / "model.safetensors", {"format": "pt"})
    known = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def lora_tensors(layers: int = 2, rank: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """A and B for both modules of every layer, under the keys PEFT writes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module in MODULES:
            rows = 2 * HIDDEN if module.startswith("mlp") else HIDDEN
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A LoRA adapter folder as PEFT lays it out; ``config`` adds to adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(tensors if tensors is not None else lora_tensors())
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))
    return folder


def listing(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}
