"""One adapter at weight 1, density 1 equals PEFT's own ``merge_and_unload()`` in float32, for every accepted kind.

Every adapter was trained by PEFT for a few steps. Where PEFT is wrong, the test says so and shows the true formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.engine import peft_zoo
from tests.engine.merges import merge
from worker.engine import blocks
from worker.engine.kernels import Room

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square, so a forgotten transposition would fit
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONVOLUTIONS = r".*conv_layers\.\d+\.conv"

# By kind: the architecture, and what its config says beside r = 4 and alpha = 10.
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
    "conv1d of gpt2": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d of gpt2, flag forgotten": ("gpt2", {"target_modules": CONV1D}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embedding of positions": ("gpt2", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "convolution in 1d": ("wav2vec2", {"target_modules": CONVOLUTIONS}),
    "convolution in 2d": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "convolution in 3d": ("videomae", {"target_modules": ["projection"]}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "dora, rslora": ("llama", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "dora on conv1d of gpt2": ("gpt2", {"target_modules": CONV1D, "use_dora": True, "fan_in_fan_out": True}),
    "dora on embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "use_dora": True}),
    "dora on convolution in 1d": ("wav2vec2", {"target_modules": CONVOLUTIONS, "use_dora": True}),
    "dora on convolution in 2d": ("resnet", {"target_modules": ["convolution"], "use_dora": True}),
    "dora on convolution in 3d": ("videomae", {"target_modules": ["projection", "query"], "use_dora": True}),
    "lora_bias": ("llama", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "use_rslora": True}),
    "lora_bias of convolution": ("wav2vec2", {"target_modules": CONVOLUTIONS, "lora_bias": True}),
    "bias: all": ("llama", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "bias: all, gpt2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias: lora_only": ("llama", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "modules_to_save": ("llama", {"target_modules": LINEAR[:2], "modules_to_save": ["norm", "lm_head"]}),
    "modules_to_save on gpt2": ("gpt2", {"target_modules": CONV1D, "modules_to_save": ["ln_f"]}),
    "modules_to_save, tied": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "modules_to_save on experts": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate", "experts"]}),
    "trained tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 90]}),
    "trained tokens, tied": (
        "tied llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 95, 7]}},
    ),
    "experts of mixtral": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "experts and router": (
        "mixtral",
        {"target_modules": [], "target_parameters": [*EXPERTS, "gate.weight"]},
    ),
    "linear layers of mixtral": ("mixtral", {"target_modules": "all-linear"}),
    "experts of qwen3": ("qwen3 moe", {"target_modules": LINEAR, "target_parameters": EXPERTS}),
    "experts of gpt-oss, stored in one": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"], "use_rslora": True},
    ),
    "parameters of two axes": (
        "gpt2",
        {"target_modules": [], "target_parameters": ["c_attn.weight", "attn.c_proj.weight"]},
    ),
    "bert": ("bert", {"target_modules": ["query", "value", "word_embeddings"]}),
    "vit, renamed on load": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mica": ("llama", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "velora": ("llama", {"target_modules": LINEAR, "velora_config": {"num_groups": 4}}),
}
ADALORA: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("llama", {"target_modules": LINEAR, "total_step": 10}),
    "adalora, ranks taken away": ("llama", {"target_modules": ["q_proj", "k_proj"], "total_step": 3, "tfinal": 1}),
    "adalora on conv1d of gpt2": ("gpt2", {"target_modules": CONV1D[:2], "total_step": 10, "fan_in_fan_out": True}),
    "adalora on convolution": ("resnet", {"target_modules": ["convolution"], "total_step": 10}),
}
# Method, room, and the values of a block: small ones end inside rows, and spread the norms of DoRA over several.
WAYS: dict[str, tuple[str, Room, int]] = {
    "task_arithmetic": ("task_arithmetic", "reference", blocks.BLOCK_VALUES),
    "ties": ("ties", "cpu", blocks.BLOCK_VALUES),
    "small blocks": ("ties", "cpu", 90),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trained adapter: ``root`` holds ``base`` and ``adapter``; ``merged`` is what PEFT makes of them."""

    architecture: str
    root: Path
    merged: Mapping[str, torch.Tensor]
    base: Mapping[str, torch.Tensor]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A base of each architecture, written when it is first asked for."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = peft_zoo.write_base(name, tmp_path_factory.mktemp("bases") / name.replace(" ", "-"))
            return self[name]

    return Bases()


@pytest.fixture(scope="module", params=[*KINDS, *ADALORA])
def case(request: pytest.FixtureRequest, bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return trained_case(request.param, bases, tmp_path_factory.mktemp("case"))


def trained_case(kind: str, bases: Mapping[str, Path], root: Path) -> Case:
    from peft import AdaLoraConfig, LoraConfig

    architecture, options = KINDS.get(kind) or ADALORA[kind]
    task = peft_zoo.ARCHITECTURES[architecture].task
    config: Any
    if kind in ADALORA:
        config = AdaLoraConfig(init_r=6, target_r=2, lora_alpha=10, task_type=task, **options)
    else:
        config = LoraConfig(r=4, lora_alpha=10, task_type=task, **options)
    (root / "base").symlink_to(bases[architecture])
    peft_zoo.train(architecture, root / "base", root / "adapter", config)
    merged = peft_zoo.merged_by_peft(architecture, root / "base", root / "adapter")
    base = dict(peft_zoo.load(architecture, root / "base").state_dict())
    return Case(architecture=architecture, root=root, merged=merged, base=base)


def merged_here(
    root: Path, architecture: str, *, method: str = "task_arithmetic", room: Room = "cpu", sources: Any = None
) -> dict[str, torch.Tensor]:
    """The merge of ``root``'s adapter (or ``sources``) onto its base, loaded by transformers."""
    models = sources or [{"adapter": "adapter"}]
    out = root / f"out-{sum(1 for _ in root.iterdir())}"
    recipe = parse_recipe({"base_model": "base", "merge_method": method, "models": models})
    merge(make_plan(recipe, Resolver(local=root)), out, room=room)
    return dict(peft_zoo.load(architecture, out).state_dict())


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Within 1e-6, relative to each tensor's largest value."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * scale), name


@pytest.mark.parametrize("way", WAYS)
def test_one_adapter_equals_merge_and_unload(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, room, block_values = WAYS[way]
    monkeypatch.setattr(blocks, "BLOCK_VALUES", block_values)
    found = merged_here(case.root, case.architecture, method=method, room=room)
    assert_equal(found, case.merged)
    assert any(not torch.equal(value, case.base[name]) for name, value in found.items()), "nothing was trained"
