"""A PEFT adapter's folder → AdapterSource, or a refusal that names what it is (peft-adapters.md).

Accepted are LoRA and AdaLoRA on linear layers, GPT-2's Conv1D, embeddings, convolutions and the parameters of
experts; rsLoRA, DoRA, patterns, biases, trained tokens and saved modules. PiSSA, OLoRA and CorDA adapters that were
converted to plain LoRA are plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.errors import MergeyardError
from app.sources.adapter_keys import Module, SortedKeys, declared, sort_keys
from app.sources.adapter_kinds import refuse_other_kinds
from app.sources.models import PICKLES, pin, read_json
from app.sources.patterns import Patterns, is_adalora
from app.sources.safetensors import FLOATS, Header, read_header
from app.sources.source import AdapterSource, LoraModule, RemoteFile, Scaling, TensorSpec, TokenRows

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EMBEDDED = ("embed_tokens", "lm_head")  # PEFT also saves resized embeddings without declaring them
MAX_TOKENS = 1_000_000  # trained ones, in all modules together
MAX_NAMES = 256  # that a config lists, of modules to save or parameters to adapt: each is looked for in every tensor
MAX_SCALINGS = 1_000_000  # parameters that the config may mean, in all modules together
TARGET = "weight"  # what LoRA adapts unless target_parameters names something else


def load_adapter(
    files: Mapping[str, Path], reference: str, remote: Mapping[str, RemoteFile] = MappingProxyType({})
) -> AdapterSource:
    """Read an adapter's config and header. ``files`` maps names inside the adapter to real paths, ``remote`` those of
    which only the header is here.

    Raises:
        MergeyardError: `source_not_found`, `pickle_refused`, `source_format`, what `refuse_other_kinds` raises,
            `adapter_incomplete`, `adapter_leftover`, `adapter_invalid` (config and tensors contradict each other).
    """
    if CONFIG not in files:
        raise MergeyardError("source_not_found", f"{reference} has no {CONFIG}; it is not an adapter folder")
    config = read_json(files[CONFIG], reference)
    refuse_other_kinds(config, reference)
    header = _weights(files, reference, remote)
    keys = sort_keys(header.tensors)
    _check_keys(keys, config, reference)
    patterns = Patterns(config, reference)
    modules = tuple(
        module
        for place, parts in sorted(keys.parts.items(), key=lambda item: (item[0].name, item[0].depth))
        if (module := _module(place, parts, config, patterns, reference)) is not None
    )
    return AdapterSource(
        reference=reference,
        config=config,
        modules=modules,
        saved=keys.saved,
        tokens=_tokens(keys, config, reference),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        files=(header.file, pin(files[CONFIG], CONFIG)),
    )


def _weights(files: Mapping[str, Path], reference: str, remote: Mapping[str, RemoteFile]) -> Header:
    if WEIGHTS not in files:
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles:
            message = (
                f"{reference} has only pickled weights ({pickles[0][-80:]}), which can run code when loaded; "
                "save it again with safetensors"
            )
            raise MergeyardError("pickle_refused", message)
        raise MergeyardError("source_not_found", f"{reference} has no {WEIGHTS}")
    header = read_header(files[WEIGHTS], WEIGHTS, remote.get(WEIGHTS))
    for key, tensor in header.tensors.items():
        if tensor.dtype not in FLOATS:
            raise _invalid(reference, f"{key} has the dtype {tensor.dtype}; factors are floating-point")
    return header


def _check_keys(keys: SortedKeys, config: Mapping[str, Any], reference: str) -> None:
    """Every key is accounted for once, by the config."""
    if keys.twice:
        raise _invalid(reference, f"{keys.twice[0]} is there twice, under two names")
    if keys.unknown:
        message = (
            f"{reference} holds {_some(keys.unknown)}, which is no part of a LoRA known here; save the adapter again "
            "with PEFT."
        )
        raise MergeyardError("adapter_leftover", message)
    saved_modules = _names(config, "modules_to_save", reference)
    if len(_names(config, "target_parameters", reference)) * len(keys.parts) > MAX_SCALINGS:
        raise _invalid(reference, f"target_parameters may mean more than {MAX_SCALINGS} parameters")
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise _invalid(reference, f"bias is {str(bias)[:20]!r}, and not none, all or lora_only")
    left = [
        name
        for name in keys.saved
        if not (declared(name, (*saved_modules, *EMBEDDED)) or (bias != "none" and name.endswith("bias")))
    ]
    if left:
        message = (
            f"{reference} holds {_some(left)}, neither a factor nor listed in modules_to_save; list it there, or leave "
            "it out of the file."
        )
        raise MergeyardError("adapter_leftover", message)
    # PEFT itself adds names that a model need not have, as "classifier" and "score": one of them must be there
    if saved_modules and not any(declared(name, saved_modules) for name in _all_names(keys)):
        message = (
            f"{reference} lists {_some(saved_modules)} in modules_to_save and holds none of them; the adapter is "
            "incomplete, save it again with PEFT."
        )
        raise MergeyardError("adapter_incomplete", message)
    if not keys.parts and not keys.saved and not keys.tokens:
        raise _invalid(reference, "it holds no factors and no saved modules, so it changes nothing")


def _names(config: Mapping[str, Any], field: str, reference: str) -> list[str]:
    names = config.get(field) or []
    if not isinstance(names, list) or len(names) > MAX_NAMES or not all(isinstance(item, str) for item in names):
        raise _invalid(reference, f"{field} is not a list of at most {MAX_NAMES} names")
    return names


def _all_names(keys: SortedKeys) -> list[str]:
    """Of everything that a name in modules_to_save may mean; an embedding may be there as trained rows too."""
    return [*keys.saved, *(f"{module}.{TARGET}" for module in keys.tokens)]


def _module(
    place: Module, parts: Mapping[str, TensorSpec], config: Mapping[str, Any], patterns: Patterns, reference: str
) -> LoraModule | None:
    """One module's factors; None where AdaLoRA took all of its rank away."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    prefix = "lora_embedding_" if embedding else "lora_"
    adalora = is_adalora(config)
    wanted = {f"{prefix}A", f"{prefix}B"}
    wanted |= {"lora_E"} if adalora else set()
    wanted |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
    wanted |= {"lora_B.bias"} if config.get("lora_bias") and not embedding else set()
    missing = sorted(wanted - set(parts))
    if missing:
        message = f"{place.name} has no {missing[0]} in {reference}; the adapter is incomplete, save or fetch it again."
        raise MergeyardError("adapter_incomplete", message)
    extra = sorted(set(parts) - wanted - ({"ranknum"} if adalora else set()))
    if extra:
        raise _invalid(reference, f"{place.name} has {extra[0]}, and the config says nothing of it")
    A, B = parts[f"{prefix}A"], parts[f"{prefix}B"]
    if len(A.shape) < 2 or len(B.shape) < 2 or len(A.shape) != len(B.shape):
        raise _unfitting(reference, place.name, A, B)
    if adalora and A.shape[0] == 0:
        return None
    rank_count = parts.get("ranknum")
    if rank_count is not None and rank_count.shape not in ((), (1,)):
        raise _invalid(reference, f"ranknum of {place.name} is not one number")
    scalings = _scalings(place, config, patterns, saved_rank_count=rank_count is not None)
    module = LoraModule(
        module=place.name,
        A=A,
        B=B,
        scalings=scalings,
        embedding=embedding,
        magnitude=parts.get("lora_magnitude_vector"),
        bias=parts.get("lora_B.bias"),
        singular_values=parts.get("lora_E"),
        rank_count=rank_count,
    )
    if set(scalings) == {TARGET}:
        _check_factors(module, scalings[TARGET], reference, adalora=adalora)
    return module


def _scalings(
    place: Module, config: Mapping[str, Any], patterns: Patterns, *, saved_rank_count: bool
) -> dict[str, Scaling]:
    """By parameter: those of ``target_parameters`` that may be this module's, and its weight."""
    scalings = {TARGET: patterns.scaling(place.name, saved_rank_count=saved_rank_count)}
    for target in config.get("target_parameters") or []:
        inside, _, parameter = target.rpartition(".")
        if parameter and (not inside or f".{place.name}".endswith(f".{inside}")):
            scalings[parameter] = patterns.scaling(f"{place.name}.{parameter}")
    return scalings


def _check_factors(module: LoraModule, scaling: Scaling, reference: str, *, adalora: bool) -> None:
    """A and B fit each other and the config. AdaLoRA may have kept less than its first rank."""
    rank = module.A.shape[0]
    if module.B.shape[1] != rank and len(module.A.shape) > 2:
        message = (
            f"{module.module} in {reference} is a convolution with groups, whose factors have no product; merge it "
            "with the library that trained it, and name the result as a model."
        )
        raise MergeyardError("adapter_grouped_conv", message)
    values = module.singular_values
    if module.B.shape[1] != rank or (values is not None and values.shape not in ((rank,), (rank, 1))):
        raise _unfitting(reference, module.module, module.A, module.B)
    if scaling.rank != rank and not (adalora and rank < scaling.rank):
        raise _invalid(reference, f"{module.module} has rank {rank}, and its config says {scaling.rank:g}")


def _tokens(keys: SortedKeys, config: Mapping[str, Any], reference: str) -> tuple[TokenRows, ...]:
    """``trainable_token_indices``: a list for the input embedding, or lists by module."""
    indices = config.get("trainable_token_indices")
    if not indices:
        if keys.tokens:
            raise _invalid(reference, f"{next(iter(keys.tokens))} has trained tokens, and its config says of none")
        return ()
    if not isinstance(indices, dict | list) or (isinstance(indices, dict) and len(indices) > MAX_NAMES):
        raise _invalid(reference, f"trainable_token_indices is no list of tokens, nor at most {MAX_NAMES} by module")
    if not keys.tokens:
        message = f"{reference} trained tokens and holds no rows of them; the adapter is incomplete, save it again."
        raise MergeyardError("adapter_incomplete", message)
    found: list[TokenRows] = []
    left = MAX_TOKENS
    for module, rows in keys.tokens.items():
        own: Any = indices
        if isinstance(indices, dict):
            own = next((value for name, value in indices.items() if module.endswith(name)), None)
        if not isinstance(own, list) or len(own) > left or not all(_token(item) for item in own):
            raise _invalid(reference, f"trainable_token_indices has no list of tokens for {module}, or too long a one")
        left -= len(own)
        if len(set(own)) != len(own):
            raise _invalid(reference, "trainable_token_indices names a token twice")
        if len(rows.shape) != 2 or rows.shape[0] != len(own):
            raise _invalid(reference, f"{module} has {list(rows.shape)} trained values for {len(own)} tokens")
        found.append(TokenRows(module=module, indices=tuple(own), rows=rows))
    return tuple(found)


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _unfitting(reference: str, module: str, A: TensorSpec, B: TensorSpec) -> MergeyardError:
    return _invalid(reference, f"the factors of {module} do not fit each other: A {list(A.shape)}, B {list(B.shape)}")


def _invalid(reference: str, what: str) -> MergeyardError:
    return MergeyardError("adapter_invalid", f"{reference}: {what}.")
