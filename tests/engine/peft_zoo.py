"""Tiny models of several architectures, and adapters that PEFT itself trained on them for a few steps.

transformers writes the bases and loads the results, PEFT writes the adapters: nothing here knows a key's spelling.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
STEPS = 3


def _llama(*, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=48, n_layer=2, n_head=4))


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )


def _bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def _qwen_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=56,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=2,  # every other layer is dense
    )
    return Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    return GptOssForCausalLM(config)


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 12),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        conv_bias=True,
        mask_time_prob=0.0,
        classifier_proj_size=8,
    )
    return Wav2Vec2ForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def _videomae() -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_frames=4,
        num_labels=3,
    )
    return VideoMAEForVideoClassification(config)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    build: Callable[[], nn.Module]
    loader: str  # the Auto class that loads it
    inputs: Callable[[torch.Generator], dict[str, torch.Tensor]]
    task: str | None = None


def _tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (3, 8), generator=generator)}


def _values(name: str, *shape: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    return lambda generator: {name: torch.randn(*shape, generator=generator)}


CAUSAL = {"loader": "AutoModelForCausalLM", "inputs": _tokens, "task": "CAUSAL_LM"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(build=lambda: _llama(tied=False), **CAUSAL),
    "tied llama": Architecture(build=lambda: _llama(tied=True), **CAUSAL),
    "gpt2": Architecture(build=_gpt2, **CAUSAL),
    "mixtral": Architecture(build=_mixtral, **CAUSAL),
    "qwen3 moe": Architecture(build=_qwen_moe, **CAUSAL),
    "gpt-oss": Architecture(build=_gpt_oss, **CAUSAL),
    "bert": Architecture(build=_bert, loader="AutoModelForSequenceClassification", inputs=_tokens, task="SEQ_CLS"),
    "resnet": Architecture(
        build=_resnet, loader="AutoModelForImageClassification", inputs=_values("pixel_values", 2, 3, 16, 16)
    ),
    "wav2vec2": Architecture(
        build=_wav2vec2, loader="AutoModelForAudioClassification", inputs=_values("input_values", 2, 256)
    ),
    "vit": Architecture(
        build=_vit, loader="AutoModelForImageClassification", inputs=_values("pixel_values", 2, 3, 16, 16)
    ),
    "videomae": Architecture(
        build=_videomae, loader="AutoModelForVideoClassification", inputs=_values("pixel_values", 2, 4, 3, 8, 8)
    ),
}


def write_base(name: str, folder: Path) -> Path:
    """A tiny random model in float32, every value of which is random: fresh biases and norms would hide mistakes."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def load(name: str, folder: Path) -> Any:
    import transformers

    model = getattr(transformers, ARCHITECTURES[name].loader).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def train(
    name: str,
    base: Path,
    folder: Path,
    config: Any,
    *,
    seed: int = 1,
    prepare: Callable[[Any], None] | None = None,
    before: Callable[[Any], None] | None = None,
    save_options: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter after a few real steps of an optimiser on random data.

    ``prepare`` is given the base that the adapter is about to be put on, ``before`` the model that is about to be
    trained, ``save_options`` go to ``save_pretrained``.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = load(name, base)
        if prepare is not None:
            prepare(plain)
        model = get_peft_model(plain, config)
        if before is not None:
            before(model)
        steps(name, model, seed)
        model.save_pretrained(str(folder), **(save_options or {}))
    return folder


def steps(name: str, model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.03)
    target: torch.Tensor | None = None
    for step in range(STEPS):
        logits = model(**ARCHITECTURES[name].inputs(generator)).logits
        target = torch.randn(logits.shape, generator=generator) if target is None else target
        loss = ((logits - target) ** 2).mean()
        loss.backward()
        optimiser.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimiser.zero_grad()


def merged_by_peft(name: str, base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load(name, base), adapter)
        return dict(model.merge_and_unload().state_dict())
