"""Configs that transformers 4 and 5 read alike: what 5 writes under new names stands under the old ones, too.

transformers 4 passes over what it does not know, so there a model that 5 has saved has the default rotary embedding,
which makes it another model, and its tokenizer does not load at all. transformers 5 reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.sources.tokenizers import TOKENIZER_CONFIG

ANY_FAST = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# What transformers 4 calls θ, the rotated share of a head, and θ of sliding layers; the first for all other families.
ROTARY_NAMES = {
    "": ("rope_theta", "partial_rotary_factor", "rope_local_base_freq"),
    "gpt_neox": ("rotary_emb_base", "rotary_pct", ""),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct", ""),
    "modernbert": ("global_rope_theta", "partial_rotary_factor", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "partial_rotary_factor", "local_rope_theta"),
}
# (old, new) by family: all that 4.57 and 5.23 save under different names beside the rotary ones.
OTHER_NAMES = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "qwen3_vl_moe_text": ("num_experts", "num_local_experts"),
}


def with_old_names(name: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file's document as both read it; of files that have no such names as it is."""
    if name == "config.json":
        return _with_old_keys(document)
    return _with_old_tokenizer(document) if name == TOKENIZER_CONFIG else document


def _with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, and the configs within it, with old names behind the new ones. What stands there already stays."""
    made = {
        key: _with_old_keys(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    family, rope = str(config.get("model_type")), config.get("rope_parameters")
    old = _rotary(rope, family) if isinstance(rope, dict) else {}
    if family in OTHER_NAMES:
        name, new = OTHER_NAMES[family]
        old[name] = config.get(new)
    return {**made, **{key: value for key, value in old.items() if value is not None and key not in config}}


def _rotary(rope: Mapping[str, Any], family: str) -> dict[str, Any]:
    """``rope_parameters``, of all layers or by the kind of layer, under the family's old names."""
    theta, share, sliding_theta = ROTARY_NAMES.get(family, ROTARY_NAMES[""])
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    spread = full if isinstance(full, dict) else rope
    old = {theta: spread.get("rope_theta"), share: spread.get("partial_rotary_factor")}
    scaling = {key: value for key, value in spread.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling != {"rope_type": "default"} and "rope_type" in scaling:
        old["rope_scaling"] = scaling
    if spread is full and isinstance(sliding, dict) and sliding_theta:
        local = sliding.get("rope_theta")
        # 4 has a second θ only in families where it differs; the others' configs would not know the name
        old[sliding_theta] = local if sliding_theta == "local_rope_theta" or local != spread.get("rope_theta") else None
    return old


def _with_old_tokenizer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The class by its old name, and special tokens without a role under theirs."""
    old = dict(config)
    if (known := ANY_FAST.get(str(config.get("tokenizer_class")))) is not None:
        old["tokenizer_class"] = known
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        old["additional_special_tokens"] = old.pop("extra_special_tokens")
    return old
