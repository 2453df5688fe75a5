"""A tiny model as transformers writes it, and adapters as PEFT writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

BASE = "tiny-llama"
ADAPTERS = ("sql", "json")


def write_root(folder: Path) -> Path:
    """A model root: ``tiny-llama`` (hidden 32, 2 layers, tied) and two LoRA adapters on all its linear layers."""
    write_llama(folder / BASE)
    for seed, name in enumerate(ADAPTERS, start=1):
        write_lora(folder / BASE, folder / name, seed=seed)
    return folder


def write_llama(folder: Path, *, layers: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Llama of random weights, about 30 000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def write_lora(base: Path, folder: Path, *, rank: int = 4, seed: int = 1) -> Path:
    """A LoRA adapter for the model at ``base``, whose B is not zero, so that it changes something."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder)
    return folder


def documents(**changes: object) -> dict[str, list[dict[str, object]]]:
    """Two documents: adapters merged into the tiny model, and the base and the result of that averaged.

    ``changes`` are those of the last one.
    """
    averaged = {
        "merge_method": "linear",
        "models": [{"model": f"models:{BASE}"}, {"model": "both"}],
        "parameters": {"weight": 0.5},
    }
    return {"documents": [{**recipe(), "name": "both"}, {**averaged, **changes}]}


def recipe(**changes: object) -> dict[str, object]:
    """A TIES recipe over the tiny model and both adapters."""
    return {
        "base_model": f"models:{BASE}",
        "merge_method": "ties",
        "models": [{"adapter": f"models:{name}", "parameters": {"weight": 1.0, "density": 0.5}} for name in ADAPTERS],
        **changes,
    }
