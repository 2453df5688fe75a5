"""Kinds of adapters that cannot be merged: each is recognised by its config, and refused by name (peft-adapters.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.errors import MergeyardError

# Config fields that say nothing about ΔW, or that are read when the adapter is.
KNOWN_FIELDS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
        "corda_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "lora_ga_config",
        "velora_config", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters",
        # AdaLoRA's
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    }
)  # fmt: skip
# Fields that change what the adapter computes: the code, what the adapter is, and what to do.
REFUSED_FIELDS: Mapping[str, tuple[str, str, str]] = {
    "alora_invocation_tokens": (
        "adapter_alora",
        "an activated LoRA (aLoRA), which works only after its invocation tokens",
        "serve it beside the model instead",
    ),
    "arrow_config": (
        "adapter_arrow",
        "an Arrow router, which chooses between adapters token by token",
        "merge the adapters it routes to instead",
    ),
    "kasa_config": (
        "adapter_kasa",
        "a KaSA adapter, which takes its base's smallest singular values away",
        "let PEFT merge it into its base, and name the result as a model",
    ),
    "use_qalora": (
        "adapter_qalora",
        "a QA-LoRA adapter, which works on pooled inputs of a quantised base",
        "train a plain LoRA on the full weights",
    ),
    "monteclora_config": (
        "adapter_monteclora",
        "a MonteCLoRA adapter, whose factors are drawn at random",
        "let PEFT merge it into its base, and name the result as a model",
    ),
    "use_bdlora": (
        "adapter_bdlora",
        "a BD-LoRA adapter, whose factors are block-diagonal",
        "let PEFT merge it into its base, and name the result as a model",
    ),
    "layer_replication": (
        "adapter_layer_replication",
        "an adapter for a model with replicated layers, which the original base does not have",
        "save the replicated model with the adapter merged into it, and name that as a model",
    ),
}
# Initialisations that leave the base as it was, so that ΔW is s·B·A.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
RAW_INIT = ("pissa", "olora", "corda", "lora_ga")


def refuse_other_kinds(config: Mapping[str, Any], reference: str) -> None:
    """Raises MergeyardError where the adapter is of a kind that cannot be merged, or has a field unknown here.

    The codes are those of ``REFUSED_FIELDS``, `adapter_xlora`, `adapter_peft_type`, `adapter_loftq`,
    `adapter_raw_init` and `adapter_unsupported`.
    """
    _refuse_other_types(config, reference)
    for field, (code, what, instead) in REFUSED_FIELDS.items():
        if config.get(field):
            raise MergeyardError(code, f"{reference} is {what}; {instead}.")
    _refuse_changed_bases(config.get("init_lora_weights"), reference)
    for field, value in config.items():
        if field not in KNOWN_FIELDS and field not in REFUSED_FIELDS and value:
            message = (
                f"{reference} has the field {field[:40]} in its config, which is not known here and may change what it "
                "computes; set it to null if it does not, or let PEFT merge the adapter."
            )
            raise MergeyardError("adapter_unsupported", message)


def _refuse_other_types(config: Mapping[str, Any], reference: str) -> None:
    kind = str(config.get("peft_type") or "LORA").upper()[:30]
    if kind == "XLORA":
        message = (
            f"{reference} is an X-LoRA, which mixes its adapters anew for every input; merge the adapters it was made "
            "of instead."
        )
        raise MergeyardError("adapter_xlora", message)
    if kind not in ("LORA", "ADALORA"):
        message = (
            f"{reference} is an adapter of the type {kind}, and only LoRA and AdaLoRA are merged here; let PEFT merge "
            "it into its base (merge_and_unload), and name the result as a model."
        )
        raise MergeyardError("adapter_peft_type", message)


def _refuse_changed_bases(init: Any, reference: str) -> None:
    """Initialisations that changed the base: the adapter is a difference to something that is not at hand."""
    if init in PLAIN_INIT:
        return
    name = str(init).lower()[:30]
    if name == "loftq":
        message = (
            f"{reference} was initialised by LoftQ, against a quantised base that no file here holds; merge it into "
            "that base with PEFT, and name the result as a model."
        )
        raise MergeyardError("adapter_loftq", message)
    if name.startswith(RAW_INIT):
        message = (
            f"{reference} started from a base that its initialisation changed (init_lora_weights: {name}); convert it "
            "to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
        raise MergeyardError("adapter_raw_init", message)
    message = f"{reference} has init_lora_weights: {name}, which is not known here; let PEFT merge the adapter."
    raise MergeyardError("adapter_unsupported", message)
