"""An adapter's factors against the base's shapes: which tensor they change, and how their product lies in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import MergeyardError
from app.planning.naming import Whole
from app.planning.plan import LoraFactors
from app.sources.safetensors import FLOATS
from app.sources.source import AdapterSource, LoraModule, ModelSource, Scaling

# Where transformers stores weights as (in, out) in its Conv1D module, by model type; a square matrix shows nothing.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
# The one weight of torch's MultiheadAttention, which has no other name for it.
ATTENTION_INPUT = "in_proj_weight"
TARGET = "weight"


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter that a module's factors may belong to, and what the base has there."""

    parameter: str
    whole: Whole


def names_of_module(module: LoraModule) -> tuple[str, ...]:
    """The names that what a module's factors change may have, in the adapter's naming."""
    named = [parameter for parameter in module.scalings if parameter != TARGET]
    return tuple(f"{module.module}.{parameter}" for parameter in (*named, TARGET, ATTENTION_INPUT))


def fit_parameters(
    modules: Sequence[LoraModule], targets: Sequence[Target], adapter: AdapterSource, base: ModelSource
) -> dict[str, LoraFactors]:
    """The factors of one module (several where ``target_parameters`` named several of its parameters), by tensor.

    Raises:
        MergeyardError: `adapter_shape` where factors fit no target; `adapter_ambiguous` where they fit several, or one
            in two ways; `adapter_invalid`; `adapter_mismatch` where the base's weights are packed.
    """
    explicit = [target for target in targets if target.parameter in modules[0].scalings and target.parameter != TARGET]
    explicit = explicit or [target for target in targets if target.parameter != ATTENTION_INPUT] or list(targets)
    fits = [[_fit(module, target, adapter, base) for target in explicit] for module in modules]
    ways = list(_assignments(fits))
    if len(ways) > 1:
        message = (
            f"The factors of {modules[0].module} in {adapter.reference} fit {_places(explicit)} in more than one way; "
            "train one parameter at a time, or let PEFT merge the adapter."
        )
        raise MergeyardError("adapter_ambiguous", message)
    if not ways:
        raise _shapes(modules, explicit, adapter)
    return {name: factors for fit in ways[0] for name, factors in fit.items()}


def is_conv1d(module: str, base: ModelSource) -> bool:
    """Whether transformers stores this module's weight as (in, out)."""
    return base.config.get("model_type") in CONV1D_MODEL_TYPES and module.rpartition(".")[2] in CONV1D_MODULES


Fit = Mapping[str, LoraFactors]


def _assignments(fits: Sequence[Sequence[Fit | None]], taken: frozenset[int] = frozenset()) -> list[list[Fit]]:
    """Every way to give each module a target of its own."""
    if not fits:
        return [[]]
    return [
        [fit, *rest]
        for index, fit in enumerate(fits[0])
        if fit is not None and index not in taken
        for rest in _assignments(fits[1:], taken | {index})
    ][:2]  # two are enough to know that it is ambiguous


def _fit(module: LoraModule, target: Target, adapter: AdapterSource, base: ModelSource) -> Fit | None:
    """The factors by tensor, or None where the shapes say no."""
    whole = target.whole
    specs = [base.tensors[name] for name in ([part.name for part in whole.parts] or [whole.name])]
    packed = next((spec for spec in specs if spec.dtype not in FLOATS), None)
    if packed is not None:
        message = f"{packed.name} is {packed.dtype} in the base; packed weights cannot take an adapter."
        raise MergeyardError("adapter_mismatch", message)
    scaling = module.scalings.get(target.parameter, module.scalings[TARGET])
    parameter = target.parameter in module.scalings and target.parameter != TARGET
    stacked = len(whole.shape) == 3 and len(module.A.shape) == 2 and (parameter or bool(whole.parts))
    if stacked:
        return _fit_experts(module, whole, scaling, adapter)
    named = any(_names(item, module.module, target.parameter) for item in _targets(adapter))
    factors = _fit_matrix(module, whole.shape, scaling, adapter, conv1d=not named and is_conv1d(module.module, base))
    return None if factors is None else {whole.name: factors}


def _fit_matrix(
    module: LoraModule, shape: tuple[int, ...], scaling: Scaling, adapter: AdapterSource, *, conv1d: bool
) -> LoraFactors | None:
    if not shape:
        return None
    A, B = module.A.shape, module.B.shape
    rows, columns = math.prod(B) // max(B[1], 1), math.prod(A) // max(A[0], 1)
    matrix = (shape[0], math.prod(shape[1:]))
    transposed = module.embedding or conv1d
    if not transposed and adapter.fan_in_fan_out and rows != columns and matrix == (columns, rows):
        transposed = True
    wanted = (columns, rows) if transposed else (rows, columns)
    whole_kernel = len(A) == 2 or (len(shape) == len(A) and shape[1:] == A[1:])
    if len(shape) < 2 or matrix != wanted or not whole_kernel:
        return None
    factors = LoraFactors(
        A=module.A,
        B=module.B,
        scale=scaling.scale,
        transposed=transposed,
        singular_values=module.singular_values,
        rank_count=module.rank_count,
        magnitude=module.magnitude,
    )
    outputs = matrix[1] if transposed else matrix[0]
    if module.magnitude is not None and math.prod(module.magnitude.shape) != outputs:
        message = (
            f"{adapter.reference}: {module.module} has {math.prod(module.magnitude.shape)} magnitudes for {outputs} "
            "outputs."
        )
        raise MergeyardError("adapter_invalid", message)
    return factors


def _fit_experts(
    module: LoraModule, whole: Whole, scaling: Scaling, adapter: AdapterSource
) -> dict[str, LoraFactors] | None:
    """A (experts·r, in) and B (out, r·experts) against (experts, rows, columns).

    Before PEFT 0.19 ΔW of an expert was (B·A)ᵀ, since then it is B·A unless the module says otherwise: the shapes tell,
    and where they do not, nothing here does.
    """
    experts, rows, columns = whole.shape
    (many, inputs), (outputs, ranks) = module.A.shape, module.B.shape
    if many != ranks or not experts or many % experts:
        return None
    straight, turned = (outputs, inputs) == (rows, columns), (inputs, outputs) == (rows, columns)
    if not (straight or turned):
        return None
    if straight and turned:
        message = (
            f"{whole.name} has square matrices, {rows} by {columns}, so its shape does not tell whether the factors in "
            f"{adapter.reference} are transposed; let PEFT merge the adapter, and name the result as a model."
        )
        raise MergeyardError("adapter_ambiguous", message)
    if many // experts != scaling.rank:
        message = f"{adapter.reference}: {whole.name} has rank {many // experts}, and its config says {scaling.rank:g}."
        raise MergeyardError("adapter_invalid", message)
    if module.magnitude is not None or module.singular_values is not None or module.bias is not None:
        message = f"{adapter.reference}: {whole.name} takes factors A and B, and nothing beside them."
        raise MergeyardError("adapter_invalid", message)
    factors = LoraFactors(A=module.A, B=module.B, scale=scaling.scale, transposed=turned, experts=experts)
    if not whole.parts:
        return {whole.name: factors}
    return {part.name: replace(factors, expert=part.expert, first_row=part.first_row) for part in whole.parts}


def _targets(adapter: AdapterSource) -> Sequence[str]:
    targets = adapter.config.get("target_parameters") or ()
    return [target for target in targets if isinstance(target, str)]


def _names(target: str, module: str, parameter: str) -> bool:
    """Whether an entry of ``target_parameters`` means this parameter: then PEFT never transposes it."""
    return f".{module}.{parameter}".endswith(f".{target}")


def _places(targets: Sequence[Target]) -> str:
    return " and ".join(f"{target.whole.name} {list(target.whole.shape)}" for target in targets)


def _shapes(modules: Sequence[LoraModule], targets: Sequence[Target], adapter: AdapterSource) -> MergeyardError:
    module = modules[0]
    factors = f"A {list(module.A.shape)} and B {list(module.B.shape)}"
    message = (
        f"{adapter.reference} changes {module.module} by {factors}, and the base has {_places(targets)} there; "
        "it is an adapter for another base."
    )
    return MergeyardError("adapter_shape", message)
