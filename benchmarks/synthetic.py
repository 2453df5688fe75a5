"""The 1.04 B-parameter case: a random Llama-shaped base of five shards in bfloat16 and four rank-16 adapters.

    python -m benchmarks.synthetic FOLDER

writes FOLDER/base and FOLDER/adapter-1 … adapter-4 (2.1 GB), a tensor at a time, so little memory is needed. The same
seeds give the same bytes. Only shapes and dtypes matter to what is measured; the values are plain Gaussian noise.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 16, 32, 8, 32000
KV = HIDDEN // HEADS * KV_HEADS
SHARDS, ADAPTERS, RANK, ALPHA = 5, 4, 16, 32
MODULES: Mapping[str, tuple[int, int]] = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def base_shapes() -> dict[str, tuple[int, ...]]:
    """The base's tensors in file order; the head is tied, so there is none."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{module}.weight": shape for module, shape in MODULES.items()}
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def adapter_shapes() -> dict[str, tuple[int, ...]]:
    """One adapter's factors on all seven linear modules, under the keys that PEFT writes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{prefix}.lora_A.weight"] = (RANK, columns)
            shapes[f"{prefix}.lora_B.weight"] = (rows, RANK)
    return shapes


def write_case(folder: Path) -> None:
    """The base and its adapters below ``folder``; what is there already is written again."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, shapes in enumerate(_shards(base_shapes()), start=1):
        filename = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_random(base / filename, shapes, torch.bfloat16, seed="base")
        places |= dict.fromkeys(shapes, filename)
    size = sum(2 * math.prod(shape) for shape in base_shapes().values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (base / "config.json").write_text(json.dumps(CONFIG, indent=2))
    for number in range(1, ADAPTERS + 1):
        adapter = folder / f"adapter-{number}"
        adapter.mkdir(exist_ok=True)
        shapes = adapter_shapes()
        write_random(adapter / "adapter_model.safetensors", shapes, torch.float32, seed=adapter.name)
        targets = [module.split(".")[1] for module in MODULES]
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": targets}
        (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, seed: str) -> None:
    """A safetensors file of Gaussian noise (σ 0.02), seeded by ``seed`` and each tensor's name."""
    word = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            values = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
            stream.write(values.view(torch.uint8).numpy().data)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Five groups of about the same size, in order."""
    total = sum(math.prod(shape) for shape in shapes.values())
    group: dict[str, tuple[int, ...]] = {}
    seen, written = 0, 0
    for name, shape in shapes.items():
        group[name] = shape
        seen += math.prod(shape)
        if seen * SHARDS >= total * (written + 1):
            yield group
            group, written = {}, written + 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the 1.04 B-parameter case.")
    parser.add_argument("folder", type=Path)
    write_case(parser.parse_args().folder)


if __name__ == "__main__":
    main()
