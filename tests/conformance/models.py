"""The models the conformance figures are made from: tiny, and the same bytes wherever they are written.

Every value is a whole number of 2⁻²⁴, drawn from a counter-based generator, so base, fine-tune and their difference are
all exact in float32. What a fine-tune changes has realistic sizes (a hundredth to a tenth of the base) and no two equal
magnitudes, so that no trim depends on how ties are broken; a third of each tensor is left as it is. Needs numpy alone:
mergekit's environment writes the same models from this file.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tests.conformance.tokens import TOKENIZERS, tokenizer_files

GRID = 2.0**-24
WEIGHT = 2**22  # a quarter, in steps of the grid
LAYERS = 3
HIDDEN = 6
HEADS, HEAD = 2, 2  # Llama's queries are narrower than its hidden state: square matrices hide mistakes
INNER = 8
VOCABULARY = 12
RANK = 2

Architecture = Literal["llama", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2")
Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a model of the root differs from ``base``.

    ``change``: the largest |δ| as a share of the largest weight, or the two shares it lies between, by tensor; 0 is
    the base itself. ``other``: weights of its own. ``touches``: only tensors whose name holds one of these.
    ``published``: GPT-2 as it was published first, without ``transformer.`` in its names and with the attention masks.
    """

    change: tuple[float, float] = (1 / 64, 1 / 8)
    other: bool = False
    touches: tuple[str, ...] = ("",)
    layers: int = LAYERS
    tied: bool = False
    dtype: Literal["F32", "BF16"] = "F32"
    tokenizer: str | None = None
    published: bool = False


UNCHANGED = (0.0, 0.0)
MODELS: Mapping[str, Variant] = {
    "base": Variant(change=UNCHANGED),
    "one": Variant(),
    "two": Variant(),
    "three": Variant(),
    "partial": Variant(touches=("mlp", "ln_1", "input_layernorm")),
    "faint-one": Variant(change=(2**-11, 2**-10)),
    "faint-two": Variant(change=(2**-11, 2**-10)),
    "far": Variant(other=True),
    "half-base": Variant(change=UNCHANGED, dtype="BF16"),
    "half-one": Variant(dtype="BF16"),
    "half-two": Variant(dtype="BF16"),
    "tied-base": Variant(change=UNCHANGED, tied=True),
    "tied-one": Variant(tied=True),
    "tied-two": Variant(tied=True),
    "published": Variant(change=UNCHANGED, published=True),
    "published-one": Variant(published=True),
    "long": Variant(layers=LAYERS + 2, other=True),
    **{name: Variant(change=UNCHANGED if name == "words" else (1 / 64, 1 / 8), tokenizer=name) for name in TOKENIZERS},
}
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora-one": {"lora_alpha": 4},
    "lora-two": {"lora_alpha": 3, "use_rslora": True},
}
TARGETS: Mapping[Architecture, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
}


def write_root(root: Path, architecture: Architecture) -> Path:
    """All models and adapters of one architecture, as ``root/tiny/NAME``: `tiny/NAME` names them on both sides."""
    for name, variant in MODELS.items():
        write_model(root / "tiny" / name, name, variant, architecture)
    for name, config in ADAPTERS.items():
        _write_adapter(root / "tiny" / name, name, config, architecture)
    return root


def write_model(folder: Path, name: str, variant: Variant, architecture: Architecture) -> None:
    """One model folder. The tied ones are Llamas; GPT-2 is tied as it is."""
    vocabulary = len(TOKENIZERS[variant.tokenizer].tokens) if variant.tokenizer else VOCABULARY
    tensors = {
        tensor: _values(name, variant, tensor, shape) for tensor, shape in _shapes(architecture, variant, vocabulary)
    }
    if variant.published:
        tensors = {tensor.removeprefix("transformer."): values for tensor, values in tensors.items()}
        masks = {f"h.{layer}.attn.bias": np.tri(6, dtype=np.float32)[None, None] for layer in range(variant.layers)}
        tensors |= masks if architecture == "gpt2" else {}
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors, variant.dtype)
    config = _config(architecture, variant, vocabulary)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if variant.tokenizer:
        for file, content in tokenizer_files(TOKENIZERS[variant.tokenizer]).items():
            (folder / file).write_text(json.dumps(content, indent=1))


def write_tensors(path: Path, tensors: Tensors, dtype: Literal["F32", "BF16"] = "F32") -> None:
    """As safetensors. BF16 keeps the upper half of each float32, so the values must be cut first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        stored = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [len(data), len(data) + stored.nbytes]}
        data += stored.tobytes()
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def drawn(label: str, count: int) -> npt.NDArray[np.uint64]:
    """``count`` raw numbers of 64 bits that depend on the label alone."""
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "big")
    return np.random.Philox(key=key).random_raw(count)


def _values(name: str, variant: Variant, tensor: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    base = _base_values(name if variant.other else "base", tensor, shape)
    changed = not variant.other and variant.change[1] > 0 and any(part in tensor for part in variant.touches)
    grid = base + _changes(name, tensor, shape, variant.change) if changed else base
    values = (grid * GRID).astype(np.float32)
    return _cut(values) if variant.dtype == "BF16" else values


def _base_values(owner: str, tensor: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Even between -1/4 and 1/4; norms around 3/4."""
    raw = drawn(f"{owner}/{tensor}", math.prod(shape)).reshape(shape)
    values = (raw >> 41).astype(np.int64) - WEIGHT
    norm = len(shape) == 1 and tensor.endswith("weight")
    return values // 4 + 3 * WEIGHT if norm else values


def _changes(name: str, tensor: str, shape: tuple[int, ...], between: tuple[float, float]) -> npt.NDArray[np.int64]:
    """δ: magnitudes that grow with the square of a random rank, all different, the lowest third zero."""
    count = math.prod(shape)
    raw = drawn(f"{name}/{tensor}/change", count + 1)
    share = between[0] + (between[1] - between[0]) * (int(raw[-1] >> 11) / 2**53)
    largest = int(share * WEIGHT)
    rank = np.empty(count, np.int64)
    rank[np.argsort(raw[:-1], kind="stable")] = np.arange(count)
    magnitude = rank + rank**2 * largest // count**2
    magnitude[rank < count // 3] = 0
    sign = 1 - 2 * (raw[:-1] & 1).astype(np.int64)
    return (sign * magnitude).reshape(shape)


def _cut(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """To what bfloat16 holds exactly."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _shapes(architecture: Architecture, variant: Variant, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if architecture == "llama":
        yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
        for layer in range(variant.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (HIDDEN,)
            yield f"{at}.self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
            yield f"{at}.self_attn.k_proj.weight", (HEAD, HIDDEN)
            yield f"{at}.self_attn.v_proj.weight", (HEAD, HIDDEN)
            yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
            yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
            yield f"{at}.mlp.gate_proj.weight", (INNER, HIDDEN)
            yield f"{at}.mlp.up_proj.weight", (INNER, HIDDEN)
            yield f"{at}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield "model.norm.weight", (HIDDEN,)
        if not variant.tied:
            yield "lm_head.weight", (vocabulary, HIDDEN)
        return
    yield "transformer.wte.weight", (vocabulary, HIDDEN)
    yield "transformer.wpe.weight", (6, HIDDEN)
    for layer in range(variant.layers):
        at = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            yield f"{at}.{norm}.weight", (HIDDEN,)
            yield f"{at}.{norm}.bias", (HIDDEN,)
        for module, rows, columns in (
            ("attn.c_attn", HIDDEN, 3 * HIDDEN),
            ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, INNER),
            ("mlp.c_proj", INNER, HIDDEN),
        ):
            yield f"{at}.{module}.weight", (rows, columns)
            yield f"{at}.{module}.bias", (columns,)
    yield "transformer.ln_f.weight", (HIDDEN,)
    yield "transformer.ln_f.bias", (HIDDEN,)


def _config(architecture: Architecture, variant: Variant, vocabulary: int) -> dict[str, Any]:
    shared = {"vocab_size": vocabulary, "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[variant.dtype]}
    if architecture == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": HIDDEN,
            "n_inner": INNER,
            "n_head": HEADS,
            "n_layer": variant.layers,
            "n_positions": 6,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **shared,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "head_dim": HEAD,
        "num_key_value_heads": 1,
        "num_hidden_layers": variant.layers,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": variant.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **shared,
    }


def _write_adapter(folder: Path, name: str, own: Mapping[str, Any], architecture: Architecture) -> None:
    """A LoRA adapter of rank 2 on some modules of every layer but the second, as PEFT names it."""
    tensors: Tensors = {}
    for tensor, shape in _shapes(architecture, MODELS["base"], VOCABULARY):
        module = tensor.removesuffix(".weight")
        if module.rpartition(".")[2] not in TARGETS[architecture] or ".1." in module or tensor == module:
            continue
        rows, columns = reversed(shape) if architecture == "gpt2" else shape  # Conv1D holds (in, out)
        for half, half_shape, bits in (("A", (RANK, columns), 41), ("B", (rows, RANK), 43)):
            raw = drawn(f"{name}/{module}/{half}", math.prod(half_shape)).reshape(half_shape) >> bits
            values = raw.astype(np.int64) - 2 ** (63 - bits)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = (values * GRID).astype(np.float32)
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "target_modules": list(TARGETS[architecture]),
        "layers_to_transform": [0, 2],
        "layers_pattern": "h" if architecture == "gpt2" else "layers",
        "fan_in_fan_out": architecture == "gpt2",
        "bias": "none",
        **own,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
