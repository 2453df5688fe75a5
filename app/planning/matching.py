"""Fitting a source to the base: every tensor it changes finds its place there, or a problem names both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from app.errors import MergeyardError, Problem
from app.planning.plan import LoraFactors
from app.sources.safetensors import FLOATS
from app.sources.source import AdapterSource, LoraModule, ModelSource, TensorSpec

# Where transformers stores weights as (in, out) in its Conv1D module, by model type; a square matrix shows nothing.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
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
    problems = []
    unmatched = []
    factors = {}
    for module in adapter.modules:
        name = f"{module.module}.weight"
        spec = base.tensors.get(name)
        if spec is None:
            unmatched.append(module.module)
        else:
            fitted = _fit(module, spec, adapter, base)
            if isinstance(fitted, Problem):
                problems.append(fitted)
            else:
                factors[name] = fitted
    for name, saved in adapter.saved.items():
        spec = base.tensors.get(name)
        if spec is None:
            unmatched.append(name)
        elif saved.shape != spec.shape:
            message = (
                f"{name} was saved as {list(saved.shape)} in {adapter.reference} and is {list(spec.shape)} in the "
                "base; merge onto the base it was trained with (a grown vocabulary is not supported yet)."
            )
            problems.append(Problem(code="adapter_mismatch", message=message))
    if unmatched:
        modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
        message = (
            f"{adapter.reference} changes {_some(unmatched)}, which the base does not have; "
            f"the base has {_some(modules)}. Is it an adapter for another model?"
        )
        problems.insert(0, Problem(code="adapter_mismatch", message=message))
    if problems:
        raise MergeyardError.of(problems[:SHOWN])
    _refuse_half_of_a_tie(adapter, base, [*factors, *adapter.saved])
    return AdapterMatch(source=adapter, factors=factors, saved=adapter.saved)


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


def _refuse_half_of_a_tie(adapter: AdapterSource, base: ModelSource, changed: Iterable[str]) -> None:
    """A tied checkpoint has one tensor for embedding and head; an adapter that trained one would change both."""
    tied = base.config.get("tie_word_embeddings", True) and "lm_head.weight" not in base.tensors
    if not tied or adapter.config.get("ensure_weight_tying"):
        return
    for name in changed:
        if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS:
            message = (
                f"{adapter.reference} trained {name} alone, and the base ties it to its output head; merging would "
                "change both. Train with ensure_weight_tying, or untie the base first."
            )
            raise MergeyardError("adapter_unsupported", message)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
