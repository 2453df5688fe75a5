"""One adapter at weight 1, density 1 equals PEFT's own ``merge_and_unload()`` in float32, for every accepted kind.

PEFT writes the adapters, transformers writes the bases and loads our results: nothing here knows a key's spelling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.merges import merge, plan_of
from worker.engine.kernels import Room

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square, so a forgotten transposition would fit

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "rank_pattern": (
        "llama",
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"^model.layers.1.*up_proj": 7}},
    ),
    "alpha_pattern": ("llama", {"target_modules": LINEAR, "alpha_pattern": {"down_proj": 32, "0.self_attn.v_proj": 1}}),
    "both patterns, rslora": (
        "llama",
        {"target_modules": LINEAR, "rank_pattern": {"o_proj": 8}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
    ),
    "conv1d": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d, flag forgotten": ("gpt2", {"target_modules": CONV1D}),
    "modules_to_save": ("llama", {"target_modules": LINEAR[:2], "modules_to_save": ["norm", "lm_head"]}),
    "modules_to_save on conv1d": ("gpt2", {"target_modules": CONV1D, "modules_to_save": ["ln_f"]}),
}


def write_base(kind: str, folder: Path) -> None:
    """A tiny random model, float32, its head not tied for Llama and tied for GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=48, n_layer=2, n_head=4))
    model.save_pretrained(folder)


def write_adapter(base: Path, folder: Path, options: dict[str, Any]) -> None:
    """An adapter by PEFT, every trained value random: PEFT itself starts B at zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(str(folder))


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
def test_one_adapter_equals_merge_and_unload(kind: str, method: str, room: Room, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    architecture, options = KINDS[kind]
    write_base(architecture, tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", options)
    recipe = {"base_model": "base", "merge_method": method, "models": [{"adapter": "adapter"}]}
    merge(plan_of(tmp_path, recipe), tmp_path / "out", room=room)

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert sorted(found) == sorted(expected)
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6), name
