"""config.json of a checkpoint whose layers were stacked anew: how many there are, and what it says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import MergeyardError
from app.planning.layout import Restacked
from app.planning.modules import stacks_of
from app.sources.source import ModelSource

# Where configs state the number of layers, by architecture family.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers", *COUNTS)
# Lists with one entry for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers", "block_types")
# Layers listed by their number, or counted from one end: no such list describes layers in another order.
BY_NUMBER = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "moe_layers", "first_k_dense_replace")


def restack_config(base: ModelSource, config: Mapping[str, Any], stacks: Sequence[Restacked]) -> dict[str, Any]:
    """``config`` with the number of layers, and per-layer lists put together from those of the layers' own models.

    Raises:
        MergeyardError: `recipe_invalid` where the config states no number of layers, or lists layers by number.
    """
    changed = dict(config)
    for stack in stacks:
        before = stacks_of(base.tensors)[stack.stack]
        if list(stack.layers) == [(base, index) for index in range(before)]:
            continue
        path = _section(stack, changed)
        section = dict(_inside(changed, path))
        _refuse_numbered(base, section)
        key = next((key for key in _count_keys(stack) if section.get(key) == before), None)
        if key is None and len(stack.layers) != before:
            message = (
                f"config.json of {base.reference} states no number of layers for {stack.stack}; merge whole models"
            )
            raise MergeyardError("recipe_invalid", message)
        if key is not None:
            section[key] = len(stack.layers)
        for name in PER_LAYER:
            if isinstance(section.get(name), list):
                section[name] = [_entry(model, path, name, index) for model, index in stack.layers]
        if path:
            changed[path] = section
        else:
            changed = section
    return changed


def _section(stack: Restacked, config: Mapping[str, Any]) -> str:
    """The key of the sub-config that describes a stack; empty for the config itself."""
    for word in ("vision", "visual", "audio", "text", "language", "llm"):
        key = {"visual": "vision_config", "language": "text_config"}.get(word, f"{word}_config")
        if word in f"{stack.module}.{stack.stack}" and isinstance(config.get(key), Mapping):
            return key
    if not any(key in config for key in _count_keys(stack)) and isinstance(config.get("text_config"), Mapping):
        return "text_config"
    return ""


def _inside(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    found = config.get(path) if path else config
    return found if isinstance(found, Mapping) else {}


def _count_keys(stack: Restacked) -> tuple[str, ...]:
    parts = stack.stack.split(".")
    if stack.module != "default" and "encoder" in parts:
        return ENCODER_COUNTS
    if stack.module != "default" and "decoder" in parts:
        return DECODER_COUNTS
    return (*COUNTS, "decoder_layers", "encoder_layers")


def _entry(model: ModelSource, path: str, name: str, index: int) -> Any:
    values = _inside(model.config, path).get(name)
    if isinstance(values, list) and index < len(values):
        return values[index]
    message = f"config.json of {model.reference} has no {name} for its layer {index}, as the base's has"
    raise MergeyardError("model_mismatch", message)


def _refuse_numbered(base: ModelSource, section: Mapping[str, Any]) -> None:
    for name in BY_NUMBER:
        if section.get(name):
            message = (
                f"config.json of {base.reference} lists layers by number ({name}), which slices would leave wrong; "
                "merge whole models"
            )
            raise MergeyardError("recipe_invalid", message)
