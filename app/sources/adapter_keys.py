"""An adapter's keys: the wrapping that training left in them, and which part of which module each one is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from app.sources.source import TensorSpec

PREFIXES = ("base_model.model.", "_fsdp_wrapped_module.", "_orig_mod.", "module.")
PART = re.compile(
    r"^(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_E|ranknum|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?$"
)
# The layer that PEFT wrapped, where its name says so; a parameter's wrappers lie one in the other.
WRAPPED = re.compile(r"\.base_layer(?=\.|$)")
ORIGINAL = ".original_module."  # inside PEFT's wrapper of a module to save: what it was before
# Buffers of a training method that ΔW does not depend on.
UNUSED = re.compile(r"\.lora_velora_\w+(?:\.default)?$")


@dataclass(frozen=True, slots=True)
class Module:
    """A module's name in the base model, and how many wrappers of its parameters lie outside this one."""

    name: str
    depth: int = 0


@dataclass(slots=True)
class SortedKeys:
    """Every key of an adapter in its place. ``twice`` are those that name what another one already did."""

    parts: dict[Module, dict[str, TensorSpec]] = field(default_factory=dict)
    tokens: dict[str, TensorSpec] = field(default_factory=dict)
    saved: dict[str, TensorSpec] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, TensorSpec]) -> SortedKeys:
    """Parts are named as in PEFT: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_E``, ``lora_magnitude_vector``, …"""
    keys = SortedKeys()
    plain: dict[str, TensorSpec] = {}
    for key, tensor in tensors.items():
        name = strip_prefixes(key)
        match = PART.match(name)
        if match is None:
            plain[name] = tensor
            continue
        module, part = match["module"], match["part"]
        if part.startswith("token_adapter"):
            _put(keys.tokens, WRAPPED.sub("", module), tensor, keys)
            continue
        outer = module
        while outer.endswith(".base_layer"):
            outer = outer.removesuffix(".base_layer")
        place = Module(WRAPPED.sub("", outer), (len(module) - len(outer)) // len(".base_layer"))
        if match["leaf"] == ".bias":
            part += ".bias"
        _put(keys.parts.setdefault(place, {}), part, tensor, keys)
    adapted = {place.name for place in keys.parts}
    for name, tensor in plain.items():
        module, _, parameter = name.rpartition(".")
        if module.endswith(".base_layer"):
            module = WRAPPED.sub("", module)
            if module in adapted and parameter == "weight":
                continue  # PEFT saves the untouched base layer of a wrapped embedding or head
        own = f"{_unwrapped(module)}.{parameter}".removeprefix(".")
        if ".lora_" in name:
            if not UNUSED.search(name):
                keys.unknown.append(name)
        elif ORIGINAL in name or (own != name and own in plain):
            continue  # with a resized embedding PEFT saves its wrapper whole: the original, and the copy once more
        else:
            _put(keys.saved, own, tensor, keys)
    return keys


def strip_prefixes(key: str) -> str:
    """The name inside the base model of an adapter's key (or of a rank_pattern's module)."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key.replace("._fsdp_wrapped_module.", ".").replace("._orig_mod.", ".")


def declared(name: str, modules: Iterable[str]) -> bool:
    """Whether ``modules_to_save`` accounts for a saved tensor.

    PEFT takes every module whose name ends so: "norm" is also "layers.0.input_layernorm".
    """
    return any(f"{module}." in name for module in modules)


def _unwrapped(module: str) -> str:
    module = f"{module}.".replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return WRAPPED.sub("", module.removesuffix("."))


def _put(into: dict[str, TensorSpec], name: str, tensor: TensorSpec, keys: SortedKeys) -> None:
    if name in into:
        keys.twice.append(tensor.name)
    into[name] = tensor
