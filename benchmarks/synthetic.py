"""What is merged in the benchmarks: a random Llama of 1.04 B parameters, and synthetic changes to any Llama.

    python -m benchmarks.synthetic FOLDER [--adapters 4] [--finetunes 0]

writes FOLDER/base (2.1 GB: five shards, bfloat16), FOLDER/adapter-1 … (rank 16 on all seven linear modules, float32)
and FOLDER/finetune-1 … (the base plus noise, 2.1 GB each), a tensor at a time, so little memory is needed; what is
there is left as it is. The same seeds give the same bytes. Only shapes and dtypes matter to what is measured; the
values are plain Gaussian noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 16, 32, 8, 32000
KV = HIDDEN // HEADS * KV_HEADS
SHARDS, RANK, ALPHA = 5, 16, 32
CHANGE = 1e-3  # σ of a fine-tune's change, to weights of σ 0.02: most survive rounding to bfloat16, many are equal
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Shapes = Mapping[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the 1.04 B-parameter case.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--finetunes", type=int, default=0)
    options = parser.parse_args()
    write_case(options.folder, write_base, adapters=options.adapters, finetunes=options.finetunes)


def write_case(folder: Path, base: Callable[[Path], None], *, adapters: int, finetunes: int) -> None:
    """What is missing of the base (written by ``base``), its adapters and its fine-tunes below ``folder``."""
    if not (folder / "base" / "config.json").exists():
        _whole(folder / "base", base)
    for number in range(1, adapters + 1):
        if not (folder / f"adapter-{number}" / "adapter_config.json").exists():
            _whole(folder / f"adapter-{number}", lambda out: write_adapter(folder / "base", out))
    for number in range(1, finetunes + 1):
        if not (folder / f"finetune-{number}" / "config.json").exists():
            _whole(folder / f"finetune-{number}", lambda out: write_finetune(folder / "base", out))


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder cut short must not pass for the whole; the name stays, since the seeds are made of it."""
    draft = folder.parent / ".draft" / folder.name
    shutil.rmtree(draft.parent, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    draft.parent.rmdir()


def write_base(folder: Path) -> None:
    """The random base."""
    places: dict[str, str] = {}
    for number, shapes in enumerate(_shards(base_shapes()), start=1):
        filename = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_tensors(folder / filename, shapes, torch.bfloat16, lambda name, shape: noise("base", name, shape, 0.02))
        places |= dict.fromkeys(shapes, filename)
    size = sum(2 * math.prod(shape) for shape in base_shapes().values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))


def write_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter on the seven linear modules of every layer of the Llama at ``base``, as PEFT writes one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linear_shapes(base).items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    path = folder / "adapter_model.safetensors"
    write_tensors(path, shapes, torch.float32, lambda name, shape: noise(folder.name, name, shape, 0.02))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_finetune(base: Path, folder: Path) -> None:
    """The model at ``base`` with noise added to every weight, in its dtype; all other files are the base's."""
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
            continue
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            dtype = opened.get_tensor(next(iter(shapes))).dtype

            def changed(name: str, shape: tuple[int, ...], opened: safe_open = opened) -> torch.Tensor:
                return opened.get_tensor(name).float() + noise(folder.name, name, shape, CHANGE)

            write_tensors(folder / path.name, shapes, dtype, changed)


def base_shapes() -> dict[str, tuple[int, ...]]:
    """The random base's tensors in file order; the head is tied, so there is none."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{module}.weight": shape for module, shape in MODULES.items()}
        shapes |= {f"{prefix}{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linear modules of every layer, by the module's name."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                module = name.removesuffix(".weight")
                if module.endswith(TARGETS):
                    rows, columns = opened.get_slice(name).get_shape()
                    shapes[module] = (rows, columns)
    return shapes


def noise(seed: str, name: str, shape: tuple[int, ...], sigma: float) -> torch.Tensor:
    """float32 Gaussian noise, seeded by ``seed`` and the tensor's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.randn(shape, generator=generator).mul_(sigma)


def write_tensors(
    path: Path, shapes: Shapes, dtype: torch.dtype, values: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> None:
    """A safetensors file whose tensors are made one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            stream.write(values(name, shape).to(dtype).view(torch.uint8).numpy().data)


def _shards(shapes: Shapes) -> Iterator[dict[str, tuple[int, ...]]]:
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


if __name__ == "__main__":
    main()
