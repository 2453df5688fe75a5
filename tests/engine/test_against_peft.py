"""One adapter at weight 1, density 1 equals PEFT's own ``merge_and_unload()`` in float32, for every accepted kind.

Every adapter was trained by PEFT for a few steps. Where PEFT is wrong, the test says so and shows the true formula.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.engine import peft_zoo
from tests.engine.merges import merge, tensors_of
from tests.files import write_adapter, write_model
from worker.engine import blocks
from worker.engine.kernels import Room

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square, so a forgotten transposition would fit
BERT = ["query", "key", "value", "dense"]
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
    "rslora, patterns on gpt2": (
        "gpt2",
        {
            "target_modules": CONV1D,
            "fan_in_fan_out": True,
            "use_rslora": True,
            "rank_pattern": {"c_fc": 2, r"h\.1\.attn\.c_proj": 6},
            "alpha_pattern": {"attn.c_proj": 3},
        },
    ),
    "lora_bias on gpt2": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True, "lora_bias": True}),
    "bias: lora_only on gpt2": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True, "bias": "lora_only"}),
    "trained tokens of gpt2": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": {"wte": [0, 95, 4]}},
    ),
    "bert": ("bert", {"target_modules": ["query", "value", "word_embeddings"]}),
    "rslora, patterns on bert": (
        "bert",
        {
            "target_modules": BERT,
            "use_rslora": True,
            "rank_pattern": {"attention.output.dense": 6},
            "alpha_pattern": {r"layer\.1\..*query": 3},
        },
    ),
    "dora on bert": ("bert", {"target_modules": [*BERT, "word_embeddings"], "use_dora": True}),
    "lora_bias on bert": ("bert", {"target_modules": BERT, "lora_bias": True}),
    "bias: all on bert": ("bert", {"target_modules": BERT, "bias": "all"}),
    "modules_to_save on bert": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["classifier", "position_embeddings"]},
    ),
    "trained tokens of bert": (
        "bert",
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [7, 1]}},
    ),
    "rslora, patterns on mixtral": (
        "mixtral",
        {
            "target_modules": ["q_proj", "k_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 2, "k_proj": 6},
            "alpha_pattern": {"experts.gate_up_proj": 3},
        },
    ),
    "dora on mixtral": ("mixtral", {"target_modules": [*LINEAR[:4], "embed_tokens"], "use_dora": True}),
    "embedding of mixtral": ("mixtral", {"target_modules": ["embed_tokens", "lm_head"]}),
    "trained tokens of mixtral": (
        "mixtral",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 2]}},
    ),
    "rslora, patterns on convolution": (
        "resnet",
        {"target_modules": ["convolution"], "use_rslora": True, "rank_pattern": {"layer.1.convolution": 2}},
    ),
    "bias: all on convolution": ("resnet", {"target_modules": ["convolution"], "bias": "all"}),
    "vit, renamed on load": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mica": ("llama", {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "orthogonal": ("llama", {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "velora": ("llama", {"target_modules": LINEAR, "velora_config": {"num_groups": 4}}),
}
ADALORA: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("llama", {"target_modules": LINEAR, "total_step": 10}),
    "adalora, ranks taken away": ("llama", {"target_modules": ["q_proj", "k_proj"], "total_step": 3, "tfinal": 1}),
    "adalora on conv1d of gpt2": ("gpt2", {"target_modules": CONV1D[:2], "total_step": 10, "fan_in_fan_out": True}),
    "adalora on bert": ("bert", {"target_modules": BERT, "total_step": 10}),
    "adalora on mixtral": ("mixtral", {"target_modules": LINEAR[:4], "total_step": 10}),
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


def test_an_embedding_trained_with_its_tied_head_is_added_once(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """PEFT 0.21.2 merges both halves into the one weight, so it adds ΔW twice; unmerged it computes what is here."""
    from peft import LoraConfig, PeftModel

    (tmp_path / "base").symlink_to(bases["tied llama"])
    config = LoraConfig(
        r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    peft_zoo.train("tied llama", tmp_path / "base", tmp_path / "adapter", config)
    found = merged_here(tmp_path, "tied llama")

    name = "model.embed_tokens.weight"
    base = peft_zoo.load("tied llama", tmp_path / "base")
    before = base.state_dict()[name].clone()
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = 10 / 4 * (factors[f"{key}B"] @ factors[f"{key}A"]).T
    torch.testing.assert_close(found[name], before + delta, rtol=1e-6, atol=1e-6)
    twice = peft_zoo.merged_by_peft("tied llama", tmp_path / "base", tmp_path / "adapter")[name]
    torch.testing.assert_close(twice, before + 2 * delta, rtol=1e-5, atol=1e-5)

    tokens = torch.arange(12).view(1, 12)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = peft_zoo.load("tied llama", sorted(tmp_path.glob("out-*"))[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rslora_keeps_its_scale_in_a_weighted_merge(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """PEFT 0.21.2 ``add_weighted_adapter`` scales an rsLoRA adapter too large, by √r (#3449)."""
    from peft import LoraConfig, PeftModel

    (tmp_path / "base").symlink_to(bases["llama"])
    config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=["q_proj"], use_rslora=True)
    for seed, name in enumerate(("one", "two"), start=1):
        peft_zoo.train("llama", tmp_path / "base", tmp_path / name, config, seed=seed)
    weights = {"one": 0.75, "two": 0.5}
    sources = [{"adapter": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    found = merged_here(tmp_path, "llama", sources=sources)

    module = "model.layers.0.self_attn.q_proj"
    base = peft_zoo.load("llama", tmp_path / "base")
    before = base.state_dict()[f"{module}.weight"].clone()
    delta = torch.zeros_like(before)
    for name, weight in weights.items():
        factors = load_file(tmp_path / name / "adapter_model.safetensors")
        key = f"base_model.model.{module}.lora_"
        delta += weight * 10 / 4**0.5 * factors[f"{key}B.weight"] @ factors[f"{key}A.weight"]
    torch.testing.assert_close(found[f"{module}.weight"], before + delta, rtol=1e-6, atol=1e-6)

    peft: Any = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    peft.load_adapter(str(tmp_path / "two"), adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], list(weights.values()), "both", combination_type="svd")
    peft.set_adapter("both")
    wrong = peft.merge_and_unload().state_dict()[f"{module}.weight"] - before
    assert wrong.norm() > 1.5 * delta.norm()


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attn(x, x, x)[0]
        return result


def test_multihead_attention_takes_its_output_once(tmp_path: Path) -> None:
    """PEFT 0.21.2 adds ΔW of ``out_proj`` twice (PR #3774)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = Attention()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    write_model(tmp_path / "base", before, model_type="none", architectures=[])
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["attn"]))
    optimiser = torch.optim.AdamW([item for item in adapted.parameters() if item.requires_grad], lr=0.03)
    for _ in range(3):
        optimiser.zero_grad()
        (adapted(torch.randn(2, 5, 16)) ** 2).mean().backward()
        optimiser.step()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    recipe = parse_recipe({"base_model": "base", "merge_method": "ties", "models": [{"adapter": "adapter"}]})
    merge(make_plan(recipe, Resolver(local=tmp_path)), tmp_path / "out")

    found, factors = tensors_of(tmp_path / "out"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    product = {
        name: 3 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        for name, key in (
            ("attn.in_proj_weight", "base_model.model.attn"),
            ("attn.out_proj.weight", "base_model.model.attn.base_layer.out_proj"),
        )
    }
    for name, value in before.items():
        delta = product.get(name, torch.zeros(()))
        torch.testing.assert_close(found[name], value + delta, rtol=1e-6, atol=1e-6)
    wrong = adapted.merge_and_unload().state_dict()
    assert not torch.allclose(wrong["attn.out_proj.weight"], found["attn.out_proj.weight"], atol=1e-4)
    torch.testing.assert_close(wrong["attn.in_proj_weight"], found["attn.in_proj_weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
def test_a_grown_vocabulary_has_its_rows(saved: list[str] | None, bases: Mapping[str, Path], tmp_path: Path) -> None:
    """Five tokens more than the base, saved because they were trained (modules_to_save) or because PEFT saw it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    size = peft_zoo.VOCABULARY + 5
    (tmp_path / "base").symlink_to(bases["llama"])
    torch.manual_seed(3)
    model = peft_zoo.load("llama", tmp_path / "base")
    model.resize_token_embeddings(size, mean_resizing=False)
    config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
    adapted: Any = get_peft_model(model, config)
    peft_zoo.steps("llama", adapted, seed=1)
    adapted.save_pretrained(str(tmp_path / "adapter"))

    fresh = peft_zoo.load("llama", tmp_path / "base")
    fresh.resize_token_embeddings(size, mean_resizing=False)
    expected = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()  # type: ignore[operator]
    assert_equal(merged_here(tmp_path, "llama"), expected)
    out = sorted(tmp_path.glob("out-*"))[0]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == size


def test_experts_trained_one_by_one_are_merged_one_by_one(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """An adapter of transformers 4, whose names are the checkpoint's; PEFT fuses it when it is loaded."""
    (tmp_path / "base").symlink_to(bases["mixtral"])
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, value in load_file(bases["mixtral"] / "model.safetensors").items():
        if ".experts." in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["w1", "w2", "w3"],
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    expected = peft_zoo.merged_by_peft("mixtral", tmp_path / "base", tmp_path / "adapter")
    assert_equal(merged_here(tmp_path, "mixtral"), expected)


def test_an_adapter_finds_an_encoder_stored_without_its_model(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """BERT as it is published: ``encoder.layer.0…``, which the adapter calls ``bert.encoder.layer.0…``."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=10, target_modules=["query", "dense"])
    peft_zoo.train("bert", bases["bert"], tmp_path / "adapter", config)
    expected = peft_zoo.merged_by_peft("bert", bases["bert"], tmp_path / "adapter")
    peft_zoo.load("bert", bases["bert"]).bert.save_pretrained(tmp_path / "base")
    recipe = parse_recipe({"base_model": "base", "merge_method": "ties", "models": [{"adapter": "adapter"}]})
    merge(make_plan(recipe, Resolver(local=tmp_path)), tmp_path / "out")
    found = {f"bert.{name}": value for name, value in tensors_of(tmp_path / "out").items()}
    assert_equal(found, {name: value for name, value in expected.items() if name.startswith("bert.")})


def test_experts_of_an_earlier_peft_are_turned(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """Until 0.19 PEFT had (B·A)ᵀ for an expert: einsum "o r e, e r i -> e i o"."""
    (tmp_path / "base").symlink_to(bases["mixtral"])
    generator = torch.Generator().manual_seed(4)
    experts, rank, rows, columns = 3, 2, 48, 40
    A = torch.randn(experts * rank, rows, generator=generator)
    B = torch.randn(columns, rank * experts, generator=generator)
    key = "base_model.model.model.layers.0.mlp.experts"
    write_adapter(
        tmp_path / "adapter",
        {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B},
        target_parameters=["experts.gate_up_proj"],
        peft_version="0.18.0",
    )
    found = merged_here(tmp_path, "mixtral")["model.layers.0.mlp.experts.gate_up_proj"]
    before = peft_zoo.load("mixtral", tmp_path / "base").state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    delta = torch.einsum("ore,eri->eio", B.view(columns, rank, experts), A.view(experts, rank, rows))
    torch.testing.assert_close(found, before + 2 * delta, rtol=1e-6, atol=1e-5)
