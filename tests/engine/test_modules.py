"""``modules`` on checkpoints that transformers wrote: it loads the result, each part merged from its own sources.

Parts are told apart here by the names of the loaded model, not by those of the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.errors import MergeyardError
from tests.engine.merges import merge, plan_of

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 63  # the token that stands for a patch of an image
TOKENS = torch.tensor([[5, 9, 2, 30, 7]])
Inputs = dict[str, torch.Tensor]


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT), vision_config=dict(VISION), image_token_id=IMAGE, scale_factor=2
    )
    return Idefics3ForConditionalGeneration(config)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=8))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An architecture of several parts. ``first`` and ``second`` are two of them: the names that a recipe may use, the
    fronts of the loaded model's names, and the layers."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    first: tuple[tuple[str, ...], tuple[str, ...], int]
    second: tuple[tuple[str, ...], tuple[str, ...], int]


def _seen(patches: int, *shape: int) -> Inputs:
    tokens = torch.cat([TOKENS, torch.full((1, patches), IMAGE)], 1)
    return {"input_ids": tokens, "pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).view(*shape, 3, 8, 8)}


KINDS = {
    "t5": Kind(
        build=_t5,
        inputs=lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)},
        first=(("encoder", "encoder.block"), ("encoder.block.",), 2),
        second=(("decoder", "decoder.block"), ("decoder.block.",), 3),
    ),
    "llava": Kind(
        build=_llava,
        inputs=lambda: _seen(4, 1),
        first=(("language_model", "text_decoder"), ("model.language_model.", "lm_head."), 2),
        second=(("vision_tower", "vision_tower"), ("model.vision_tower.",), 3),
    ),
    "idefics3": Kind(
        build=_idefics3,
        inputs=lambda: _seen(1, 1, 1),
        first=(("text_model", "text_decoder"), ("model.text_model.", "lm_head."), 2),
        second=(("vision_model", "vision_tower"), ("model.vision_model.",), 3),
    ),
    "clip": Kind(
        build=_clip,
        inputs=lambda: {"input_ids": TOKENS, "pixel_values": _seen(0, 1)["pixel_values"]},
        first=(("text_model", "text_decoder"), ("text_model.",), 2),
        second=(("vision_model", "vision_tower"), ("vision_model.",), 3),
    ),
}
WEIGHTS = {"first": [0.25, 0.75], "second": [1.0, -0.5]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind a base and two models; read only."""
    folder = tmp_path_factory.mktemp("models")
    for kind, spec in KINDS.items():
        torch.manual_seed(0)
        model = spec.build()
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "one", "two"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(folder / f"{kind}-{name}")  # type: ignore[operator]
    return folder


def load(kind: str, folder: Path) -> Any:
    return type(KINDS[kind].build()).from_pretrained(folder).eval()  # type: ignore[attr-defined]


def state_of(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(kind, folder).state_dict())


def outputs(kind: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**KINDS[kind].inputs())
    return torch.as_tensor(found.logits if "logits" in found else found.logits_per_image)


def layer_of(name: str) -> int | None:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def weight_of(ends: list[float], layer: int | None, layers: int) -> float:
    """A gradient of two ends: outside the layers the first of them."""
    return ends[0] + (ends[1] - ends[0]) * (layer or 0) / (layers - 1)


def expected_of(kind: str, root: Path) -> dict[str, torch.Tensor]:
    """The first part from `one` alone, the second from both, the rest from the base."""
    base, one, two = (state_of(kind, root / f"{kind}-{name}") for name in ("base", "one", "two"))
    (_, first, layers), (_, second, others) = KINDS[kind].first, KINDS[kind].second
    merged = {}
    for name, value in base.items():
        merged[name] = value
        if not value.is_floating_point():
            continue
        if name.startswith(first):
            weight = weight_of(WEIGHTS["first"], layer_of(name), layers)
            merged[name] = value + weight * (one[name] - value)
        elif name.startswith(second):
            weight = weight_of(WEIGHTS["second"], layer_of(name), others)
            merged[name] = value + weight * (one[name] - value) + 0.5 * (two[name] - value)
    return merged


def recipe(kind: str, modules: Mapping[str, Any]) -> dict[str, Any]:
    return {"base_model": f"{kind}-base", "merge_method": "task_arithmetic", "modules": modules}


@pytest.mark.parametrize("naming", [0, 1], ids=["own names", "mergekit's names"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_merged_from_its_own(root: Path, tmp_path: Path, kind: str, naming: int) -> None:
    spec = KINDS[kind]
    modules = {
        spec.first[0][naming]: {"models": [{"model": f"{kind}-one"}], "parameters": {"weight": WEIGHTS["first"]}},
        spec.second[0][naming]: {
            "models": [
                {"model": f"{kind}-one", "parameters": {"weight": WEIGHTS["second"]}},
                {"model": f"{kind}-two"},
            ],
            "parameters": {"weight": 0.5},
        },
    }
    expected = expected_of(kind, root)
    if kind == "t5" and naming == 0:  # its own modules end with the norms after their layers
        expected |= _t5_norms(root)
    merge(plan_of(root, recipe(kind, modules)), tmp_path / "out")

    model = load(kind, tmp_path / "out")
    found = model.state_dict()
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    reference = load(kind, root / f"{kind}-base")
    before = outputs(kind, reference)
    reference.load_state_dict(expected)
    ours = outputs(kind, model)
    torch.testing.assert_close(ours, outputs(kind, reference), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-3)


def _t5_norms(root: Path) -> dict[str, torch.Tensor]:
    base, one, two = (state_of("t5", root / f"t5-{name}") for name in ("base", "one", "two"))
    encoder, decoder = "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"
    first, second = WEIGHTS["first"][0], WEIGHTS["second"][0]
    return {
        encoder: base[encoder] + first * (one[encoder] - base[encoder]),
        decoder: base[decoder] + second * (one[decoder] - base[decoder]) + 0.5 * (two[decoder] - base[decoder]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_several_parts_changes_those_that_name_it(root: Path, tmp_path: Path, kind: str) -> None:
    """It adapts both parts, under the names of the loaded model, and the recipe takes its half of the first."""
    from peft import LoraConfig, PeftModel, get_peft_model

    for name in ("base", "one"):
        shutil.copytree(root / f"{kind}-{name}", tmp_path / f"{kind}-{name}")
    base = tmp_path / f"{kind}-base"
    targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    adapted: Any = get_peft_model(load(kind, base), LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(tmp_path / "lora"))
    (names, first, _), (others, second, _) = KINDS[kind].first, KINDS[kind].second
    modules = {names[0]: {"models": [{"adapter": "lora"}]}, others[0]: {"models": [{"model": f"{kind}-one"}]}}
    merge(plan_of(tmp_path, recipe(kind, modules)), tmp_path / "out")

    before, tuned, found = (state_of(kind, tmp_path / name) for name in (base.name, f"{kind}-one", "out"))
    peft = PeftModel.from_pretrained(load(kind, base), str(tmp_path / "lora")).merge_and_unload().state_dict()
    assert any(not torch.equal(peft[name], value) for name, value in before.items() if name.startswith(second))
    assert any(not torch.equal(peft[name], value) for name, value in before.items() if name.startswith(first))
    for name, value in found.items():
        expected = peft[name] if name.startswith(first) else tuned[name] if name.startswith(second) else before[name]
        if kind == "t5" and name == "decoder.final_layer_norm.weight":
            expected = tuned[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


# By kind: the module whose layers are stacked anew, where the loaded model has them, and where its config counts them.
STACKED = {
    "t5": ("decoder", "decoder.block.", ("num_decoder_layers",)),
    "llava": ("language_model", "model.language_model.layers.", ("text_config", "num_hidden_layers")),
    "idefics3": ("vision_tower", "model.vision_model.encoder.layers.", ("vision_config", "num_hidden_layers")),
    "clip": ("text_decoder", "text_model.encoder.layers.", ("text_config", "num_hidden_layers")),
}


@pytest.mark.parametrize("kind", STACKED)
def test_layers_of_one_part_are_stacked_anew_and_counted(root: Path, tmp_path: Path, kind: str) -> None:
    """Two layers of one model and the last two of another, where T5's first block alone holds the bias of positions."""
    module, front, count = STACKED[kind]
    last = max(layer_of(name) or 0 for name in state_of(kind, root / f"{kind}-base") if name.startswith(front))
    ranges = {"one": [0, 2], "two": [last - 1, last + 1] if last > 1 else [1, 2]}
    slices = [{"sources": [{"model": f"{kind}-{name}", "layer_range": taken}]} for name, taken in ranges.items()]
    wanted = {**recipe(kind, {module: {"slices": slices}}), "merge_method": "passthrough"}
    merge(plan_of(root, wanted), tmp_path / "out")
    origins = [(name, layer) for name, (start, stop) in ranges.items() for layer in range(start, stop)]

    config: Any = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in count:
        config = config[key]
    assert config == len(origins)
    model = load(kind, tmp_path / "out")
    found, states = model.state_dict(), {name: state_of(kind, root / f"{kind}-{name}") for name in ranges}
    for name, value in found.items():
        if name.startswith(front):
            layer, _, rest = name.removeprefix(front).partition(".")
            source, own = origins[int(layer)]
            assert torch.equal(value, states[source][f"{front}{own}.{rest}"]), name
    assert outputs(kind, model).isfinite().all()


def test_a_t5_whose_first_block_lacks_the_bias_of_positions_is_refused(root: Path) -> None:
    slices = [{"sources": [{"model": "t5-one", "layer_range": [1, 3]}]}]
    with pytest.raises(MergeyardError, match="relative_attention_bias") as caught:
        plan_of(root, {**recipe("t5", {"decoder": {"slices": slices}}), "merge_method": "passthrough"})
    assert caught.value.code == "model_mismatch"
    assert caught.value.where.startswith("modules.decoder.slices[0]")
