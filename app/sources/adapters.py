"""A PEFT adapter's folder → AdapterSource, or a refusal that names what it is (peft-adapters.md).

Accepted: Linear LoRA, rsLoRA, rank_pattern, alpha_pattern, Conv1D (GPT-2), modules_to_save. PiSSA, OLoRA and CorDA
adapters that were converted to plain LoRA are plain LoRA.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from app.errors import MergeyardError
from app.sources.models import PICKLES, pin, read_json
from app.sources.safetensors import FLOATS, read_header
from app.sources.source import AdapterSource, LoraModule, TensorSpec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Config fields that say nothing about ΔW, or that this module reads.
KNOWN_FIELDS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "lora_ga_config",
        "velora_config",
    ]
)
# Fields that change what the adapter computes: refused by name when set.
REFUSED_FIELDS: Mapping[str, str] = {
    "use_dora": "a DoRA adapter",
    "lora_bias": "a LoRA with biases in its B factors",
    "trainable_token_indices": "an adapter with trainable tokens",
    "target_parameters": "an adapter on raw parameters (mixture of experts)",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which switches itself on by token",
    "use_qalora": "a QA-LoRA adapter",
    "arrow_config": "an Arrow router",
    "kasa_config": "a KaSA adapter",
    "monteclora_config": "a MonteCLoRA adapter",
    "use_bdlora": "a BD-LoRA adapter",
    "layer_replication": "an adapter for a model with replicated layers",
}
# Initialisations that leave the base as it was, so that ΔW is s·B·A.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
PREFIXES = ("base_model.model.", "_fsdp_wrapped_module.", "_orig_mod.", "module.")
BASE_LAYERS = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
MAX_PATTERNS = 1_000
MAX_PATTERN_LENGTH = 200
PATTERN_SECONDS = 1.0  # for all names together: PEFT's patterns are regular expressions, and some never end
MAX_VALUE = 1e9  # of a rank or an alpha
LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight$")


def load_adapter(files: Mapping[str, Path], reference: str) -> AdapterSource:
    """Read an adapter's config and header. ``files`` maps names inside the adapter to real paths.

    Raises:
        MergeyardError: `source_not_found`, `pickle_refused`, `source_format`, `adapter_unsupported` (with what it is),
            `adapter_invalid` (config and tensors contradict each other).
    """
    if CONFIG not in files:
        raise MergeyardError("source_not_found", f"{reference} has no {CONFIG}; it is not an adapter folder")
    config = read_json(files[CONFIG], reference)
    _refuse_other_kinds(config, reference)
    if WEIGHTS not in files:
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles:
            message = (
                f"{reference} has only pickled weights ({pickles[0]}), which can run code when loaded; "
                "save it again with safetensors"
            )
            raise MergeyardError("pickle_refused", message)
        raise MergeyardError("source_not_found", f"{reference} has no {WEIGHTS}")
    header = read_header(files[WEIGHTS], WEIGHTS)
    factors: dict[str, dict[str, TensorSpec]] = {}
    saved: dict[str, TensorSpec] = {}
    for key, tensor in header.tensors.items():
        name = strip_prefixes(key)
        if tensor.dtype not in FLOATS:
            raise _invalid(reference, f"{key} has the dtype {tensor.dtype}; factors are floating-point")
        match = LORA_KEY.match(name)
        if match:
            pair = factors.setdefault(match["module"], {})
            if match["factor"] in pair:
                raise _invalid(reference, f"{match['module']} has two {match['factor']} factors")
            pair[match["factor"]] = tensor
        elif name.endswith(BASE_LAYERS):
            continue  # PEFT saves the untouched base layer of a wrapped embedding or head
        else:
            _refuse_other_key(name, reference)
            saved[name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")] = tensor
    _check_saved(saved, config, reference)
    if not factors and not saved:
        raise _invalid(reference, "it holds no factors and no saved modules, so it changes nothing")
    patterns = Patterns(config, reference)
    return AdapterSource(
        reference=reference,
        config=config,
        modules=tuple(_module(name, pair, config, patterns, reference) for name, pair in sorted(factors.items())),
        saved=saved,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        files=(header.file, pin(files[CONFIG], CONFIG)),
    )


def strip_prefixes(key: str) -> str:
    """The name inside the base model of an adapter's key (or of a rank_pattern's module)."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key.replace("._fsdp_wrapped_module.", ".").replace("._orig_mod.", ".")


def _refuse_other_kinds(config: Mapping[str, Any], reference: str) -> None:
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        raise _unsupported(reference, f"a {kind[:30]} adapter")
    for field, what in REFUSED_FIELDS.items():
        if config.get(field):
            raise _unsupported(reference, what)
    bias = config.get("bias") or "none"
    if bias != "none":
        raise _unsupported(reference, f"an adapter that trained biases (bias: {str(bias)[:20]})")
    init = config.get("init_lora_weights")
    if init not in PLAIN_INIT:
        message = (
            f"an adapter that started from a changed base (init_lora_weights: {str(init)[:30]}); "
            "convert it to plain LoRA when saving (path_initial_model_for_weight_conversion)"
        )
        raise _unsupported(reference, message)
    for field, value in config.items():
        if field not in KNOWN_FIELDS and field not in REFUSED_FIELDS and value:
            raise _unsupported(reference, f"an adapter with the field {field[:40]}, which is not known here")


def _refuse_other_key(name: str, reference: str) -> None:
    """Kinds that show only in their tensors' names."""
    for part, what in (
        ("lora_embedding_", "an adapter on an embedding"),
        ("lora_magnitude_vector", "a DoRA adapter"),
        ("lora_E", "an AdaLoRA adapter"),
        ("lora_B.bias", "a LoRA with biases in its B factors"),
        ("token_adapter", "an adapter with trainable tokens"),
    ):
        if part in name:
            raise _unsupported(reference, what)
    if ".lora_" in name:
        raise _invalid(reference, f"the key {name} is not a factor known here; save the adapter again with PEFT")


def _check_saved(saved: Mapping[str, TensorSpec], config: Mapping[str, Any], reference: str) -> None:
    declared = config.get("modules_to_save") or []
    if not isinstance(declared, list) or not all(isinstance(item, str) for item in declared):
        raise _invalid(reference, "modules_to_save is not a list of names")
    # PEFT also saves resized embeddings without declaring them.
    known = (*declared, "embed_tokens", "lm_head")
    for name in saved:
        # PEFT takes every module whose name ends so: "norm" is also "layers.0.input_layernorm".
        parents = [name[:dot] for dot, letter in enumerate(name) if letter == "."]
        if not any(parent.endswith(known) for parent in parents):
            raise _invalid(reference, f"the key {name} is neither a factor nor listed in modules_to_save")


def _module(
    name: str, pair: Mapping[str, TensorSpec], config: Mapping[str, Any], patterns: Patterns, reference: str
) -> LoraModule:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise _invalid(reference, f"{name} has no lora_{missing}; the adapter is incomplete")
    A, B = pair["A"], pair["B"]
    if len(A.shape) > 2 or len(B.shape) > 2:
        raise _unsupported(reference, f"an adapter on a convolution ({name})")
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
        message = f"the factors of {name} do not fit each other: A {list(A.shape)}, B {list(B.shape)}"
        raise _invalid(reference, message)
    rank = patterns.value("rank_pattern", name, config.get("r", 8))
    alpha = patterns.value("alpha_pattern", name, config.get("lora_alpha", 8))
    if rank != A.shape[0]:
        raise _invalid(reference, f"{name} has rank {A.shape[0]}, and its config says {rank:g}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(module=name, A=A, B=B, scale=scale)


class Patterns:
    """``rank_pattern`` and ``alpha_pattern``, compiled once: the first key wins that ends a name as PEFT matches it."""

    def __init__(self, config: Mapping[str, Any], reference: str) -> None:
        self._reference = reference
        self._seconds = PATTERN_SECONDS
        self._found = {
            field: self._compile(field, config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")
        }

    def value(self, field: str, module: str, default: Any) -> float:
        """Raises MergeyardError `adapter_invalid` where the value is not a positive number."""
        value = next((value for pattern, value in self._found[field] if self._matches(pattern, module)), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_VALUE:
            what = field.removesuffix("_pattern")
            raise _invalid(self._reference, f"{what} of {module} is not a positive number")
        return float(value)

    def _compile(self, field: str, patterns: Any) -> list[tuple[regex.Pattern[str], Any]]:
        if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
            raise _invalid(self._reference, f"{field} is not a map of at most {MAX_PATTERNS} module names")
        compiled = []
        for key, value in patterns.items():
            try:
                if len(key) > MAX_PATTERN_LENGTH:
                    raise regex.error("too long")
                compiled.append((regex.compile(rf"(.*\.)?({key})$"), value))
            except regex.error:
                raise _invalid(
                    self._reference, f"the {field} key {key[:60]!r} is not a pattern of module names"
                ) from None
        return compiled

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        started = time.monotonic()
        try:
            return pattern.match(module, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError:
            raise _invalid(self._reference, f"the pattern {pattern.pattern[:60]!r} takes too long to match") from None
        finally:
            self._seconds -= time.monotonic() - started


def _unsupported(reference: str, what: str) -> MergeyardError:
    return MergeyardError("adapter_unsupported", f"{reference} is {what}; this version cannot merge it.")


def _invalid(reference: str, what: str) -> MergeyardError:
    return MergeyardError("adapter_invalid", f"{reference}: {what}.")
