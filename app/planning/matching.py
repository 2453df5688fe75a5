"""Fitting a source to the base: every tensor it changes finds its place there, or a problem names both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from app.errors import MergeyardError, Problem
from app.planning.plan import LoraFactors
from app.sources.safetensors import FLOATS
from app.sources.source import AdapterSource, LoraModule, ModelSource, TensorSpec

# Where transformers stores weights as (in, out) in its Conv1D module, by model type; a square matrix shows nothing.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
HEADS = frozenset({"lm_head", "embed_out"})
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"})
SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMatch:
    """A full model's tensors under the base's names."""

    source: ModelSource
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMatch:
    """An adapter's factors and saved tensors under the base's names."""

    source: AdapterSource
    factors: Mapping[str, LoraFactors]
    saved: Mapping[str, TensorSpec]


def match_model(model: ModelSource, base: ModelSource) -> ModelMatch:
    """Raises MergeyardError `model_mismatch` with every tensor that is missing, left over, or of another shape."""
    problems = []
    missing = [name for name in base.tensors if name not in model.tensors]
    extra = [name for name in model.tensors if name not in base.tensors]
    if model.config.get("tie_word_embeddings"):
        extra = [name for name in extra if name != "lm_head.weight"]  # a tied head saved twice
    if missing:
        message = f"{model.reference} lacks {_some(missing)}, which the base has."
        problems.append(Problem(code="model_mismatch", message=message))
    if extra:
        message = f"{model.reference} has {_some(extra)}, which the base lacks."
        problems.append(Problem(code="model_mismatch", message=message))
    for name, spec in base.tensors.items():
        own = model.tensors.get(name)
        if own is not None and own.shape != spec.shape:
            message = (
                f"{name} is {list(own.shape)} in {model.reference} and {list(spec.shape)} in the base; "
                "they are not fine-tunes of one model."
            )
            problems.append(Problem(code="model_mismatch", message=message))
        elif own is not None and (own.dtype in FLOATS) != (spec.dtype in FLOATS):
            message = f"{name} is {own.dtype} in {model.reference} and {spec.dtype} in the base."
            problems.append(Problem(code="model_mismatch", message=message))
    if problems:
        raise MergeyardError.of(problems[:SHOWN])
    return ModelMatch(source=model, tensors=model.tensors)


def match_adapter(adapter: AdapterSource, base: ModelSource) -> AdapterMatch:
    """Raises MergeyardError `adapter_mismatch` (unmatched modules, shapes) or `adapter_unsupported` (half of a tie)."""
    modules = {f"{module.module}.weight": module for module in adapter.modules}
    saved = dict(adapter.saved)
    if is_tied(base) and adapter.config.get("ensure_weight_tying") and "lm_head.weight" not in base.tensors:
        saved.pop("lm_head.weight", None)  # the embedding again, which the adapter saved too
    renamed = _renaming([*modules, *saved], base)
    modules = {renamed(name): module for name, module in modules.items()}
    saved = {renamed(name): spec for name, spec in saved.items()}
    _refuse_half_of_a_tie(adapter, base, [*modules, *saved])

    problems = []
    unmatched = [name for name in (*modules, *saved) if name not in base.tensors]
    if unmatched:
        names = [name for name in base.tensors if name.endswith(".weight")]
        message = (
            f"{adapter.reference} changes {_some(unmatched)}, which the base does not have; "
            f"the base has {_some(names)}. Is it an adapter for another model?"
        )
        problems.append(Problem(code="adapter_mismatch", message=message))
    factors = {}
    for name, module in modules.items():
        if name in base.tensors:
            fitted = _fit(module, base.tensors[name], adapter, base)
            if isinstance(fitted, Problem):
                problems.append(fitted)
            else:
                factors[name] = fitted
    for name, spec in saved.items():
        if name in base.tensors and spec.shape != base.tensors[name].shape:
            message = (
                f"{name} was saved as {list(spec.shape)} in {adapter.reference} and is "
                f"{list(base.tensors[name].shape)} in the base; merge onto the base it was trained with "
                "(a grown vocabulary is not supported yet)."
            )
            problems.append(Problem(code="adapter_mismatch", message=message))
    if problems:
        raise MergeyardError.of(problems[:SHOWN])
    return AdapterMatch(source=adapter, factors=factors, saved=saved)


def _renaming(names: list[str], base: ModelSource) -> Callable[[str], str]:
    """How the adapter's names become the base's: as they are, or by one prefix added to or taken from all of them.

    Checkpoints and adapters may disagree on it: GPT-2 as published says ``h.0``, an adapter ``transformer.h.0``. Only
    a prefix that makes every name match is taken, and only if no other does.
    """
    if all(name in base.tensors for name in names):
        return str
    found: list[Callable[[str], str]] = []
    own = {name.partition(".")[0] for name in names}
    if len(own) == 1:
        (first,) = own
        if all(name.removeprefix(f"{first}.") in base.tensors for name in names):
            found.append(partial(_without, f"{first}."))
    for prefix in {name.partition(".")[0] for name in base.tensors}:
        if all(f"{prefix}.{name}" in base.tensors for name in names):
            found.append(f"{prefix}.".__add__)
    return found[0] if len(found) == 1 else str


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _fit(module: LoraModule, spec: TensorSpec, adapter: AdapterSource, base: ModelSource) -> LoraFactors | Problem:
    if spec.dtype not in FLOATS:
        message = f"{spec.name} is {spec.dtype} in the base; packed weights cannot take an adapter."
        return Problem(code="adapter_mismatch", message=message)
    rows, columns = module.B.shape[0], module.A.shape[1]
    transposed = is_conv1d(module.module, base) or (
        adapter.fan_in_fan_out and spec.shape == (columns, rows) and rows != columns
    )
    wanted = (columns, rows) if transposed else (rows, columns)
    if spec.shape != wanted:
        message = (
            f"{adapter.reference} changes {spec.name} as {list(wanted)} and the base has {list(spec.shape)}; "
            "it is an adapter for another base."
        )
        return Problem(code="adapter_mismatch", message=message)
    return LoraFactors(A=module.A, B=module.B, scale=module.scale, transposed=transposed)


def is_conv1d(module: str, base: ModelSource) -> bool:
    """Whether transformers stores this module's weight as (in, out)."""
    return base.config.get("model_type") in CONV1D_MODEL_TYPES and module.rpartition(".")[2] in CONV1D_MODULES


def is_tied(base: ModelSource) -> bool:
    """Whether the embedding is the output head too. Where the config is silent: a model without a head is."""
    stated = base.config.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    causal = any("ForCausalLM" in str(name) for name in base.config.get("architectures") or ())
    return causal and not any(_last(name) in HEADS for name in base.tensors)


def _refuse_half_of_a_tie(adapter: AdapterSource, base: ModelSource, changed: Iterable[str]) -> None:
    """Embedding and head of a tied checkpoint are one; an adapter that trained one of them would change both."""
    if not is_tied(base) or adapter.config.get("ensure_weight_tying"):
        return
    halves = [name for name in changed if _last(name) in EMBEDDINGS | HEADS]
    if len(halves) == 1:
        message = (
            f"{adapter.reference} trained {halves[0]} alone, and the base ties embedding and output head; merging "
            "would change both. Train with ensure_weight_tying, or untie the base first."
        )
        raise MergeyardError("adapter_unsupported", message)


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
