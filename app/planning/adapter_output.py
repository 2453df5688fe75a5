"""What a merge writes as an adapter: which tensors as factors, at what rank, under which names, and which it cannot."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.errors import Problem
from app.planning.fitting import is_conv1d
from app.planning.low_rank import is_low_rank
from app.planning.matching import EMBEDDINGS, is_tied
from app.planning.naming import some
from app.planning.plan import AdapterPlace, AdapterPlan, Contribution, Estimates, ShardPlan, TensorPlan
from app.planning.resolving import Resolved
from app.recipe import Recipe
from app.recipe.methods import METHODS
from app.sources.adapter_keys import strip_prefixes
from app.sources.safetensors import DTYPE_BYTES
from app.sources.source import ModelSource

FILENAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM takes
DENSE_RANK = 64  # where no rank is exact and the recipe names none
SUMS = frozenset({"linear", "task_arithmetic"})
BY_FACTORS = frozenset({"core_space", "tsv", "iso_c", "knots"})
# Matrices that no linear layer holds: lookups, and the routers and experts that transformers keeps as raw parameters.
LOOKUPS = EMBEDDINGS | {"shared", "wpe", "position_embeddings", "token_type_embeddings", "embed_positions"}
RAW = re.compile(r"\.experts\.|\.(?:gate|router)\.weight$")
# The module that holds a checkpoint's tensors in the loaded model, where files may leave it out.
OUTER: Mapping[str, str] = {
    "gpt2": "transformer",
    "gptj": "transformer",
    "gpt_neo": "transformer",
    "bloom": "transformer",
    "falcon": "transformer",
    "bert": "bert",
    "roberta": "roberta",
    "gpt_neox": "gpt_neox",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAdapter:
    """An adapter's part of the plan: what is merged, into one file, and how each tensor is held there."""

    adapter: AdapterPlan
    shard: ShardPlan
    config: Mapping[str, Any]
    estimates: Estimates
    warnings: tuple[Problem, ...]


def adapter_output(
    recipe: Recipe, resolved: Resolved, tensors: Sequence[TensorPlan], estimates: Estimates
) -> PlannedAdapter:
    """The plan of an adapter; see ``problems_of_adapter`` for what cannot be one."""
    dtype = recipe.file_dtype or "F32"
    changed = tuple(replace(tensor, dtype=dtype) for tensor in _changed(tensors))
    places = {tensor.name: place_of(tensor, resolved.base) for tensor in changed}
    held = [tensor for tensor in changed if places[tensor.name].factors]
    rank = recipe.output.rank or _default_rank(recipe.merge_method, held)
    adapter = AdapterPlan(
        rank=rank,
        min_retained_energy=recipe.output.min_retained_energy,
        other=recipe.output.other,
        places=places,
    )
    nbytes = rank * sum(map(sum, (tensor.shape for tensor in held)))
    if recipe.output.other == "save":
        nbytes += sum(math.prod(tensor.shape) for tensor in changed if not places[tensor.name].factors)
    return PlannedAdapter(
        adapter=adapter,
        shard=ShardPlan(filename=FILENAME, tensors=changed),
        config=_config(rank, [places[tensor.name] for tensor in held], resolved.base),
        estimates=replace(estimates, output_bytes=nbytes * DTYPE_BYTES[dtype]),
        warnings=tuple(_warnings(recipe, rank, changed, places)),
    )


def problems_of_adapter(
    recipe: Recipe, resolved: Resolved, tensors: Sequence[TensorPlan], *, vocabulary_changes: bool
) -> Iterator[Problem]:
    """What makes an adapter impossible, as far as headers tell: what full models change, only their weights tell."""
    if vocabulary_changes or recipe.chat_template:
        message = "An adapter leaves vocabulary and chat template to its base; write a checkpoint to change them."
        yield Problem(code="not_supported", message=message, where="output.kind")
    spec = METHODS[recipe.merge_method]
    if any(
        spec.moves_base(tensor.parameters, [i.parameters for i in tensor.contributions]) for tensor in _kept(tensors)
    ):
        message = f"With these settings {recipe.merge_method} scales the base itself, which an adapter cannot."
        yield Problem(code="not_supported", message=message, where="parameters")
    changed = list(_changed(tensors))
    if not any(place_of(tensor, resolved.base).factors for tensor in changed):
        message = "No linear layer is changed, so there is nothing that an adapter could hold; write a checkpoint."
        yield Problem(code="lora_cannot_hold", message=message, where="output.kind")
    others = [tensor for tensor in changed if not place_of(tensor, resolved.base).factors]
    stated = [tensor.name for tensor in others if any(_states_change(i, resolved) for i in tensor.contributions)]
    if recipe.output.other == "refuse" and stated:
        yield cannot_hold(stated)
    experts = [tensor.name for tensor in others if RAW.search(tensor.name) or len(tensor.shape) > 2]
    if recipe.output.other == "save" and experts:
        message = f"PEFT cannot save {some(experts)} whole; write a checkpoint, or leave them out with `other: drop`."
        yield Problem(code="lora_cannot_hold", message=message, where="output.other")


def cannot_hold(names: Sequence[str]) -> Problem:
    """The problem of changed tensors that are no linear layer's."""
    message = (
        f"A LoRA adapter cannot hold what changes in {some(names)}. Write a checkpoint, or choose `other: save` "
        "(whole, which PEFT loads and vLLM refuses) or `other: drop`."
    )
    return Problem(code="lora_cannot_hold", message=message, where="output.other")


def place_of(tensor: TensorPlan, base: ModelSource) -> AdapterPlace:
    """Where the adapter holds a tensor: as the factors of a linear layer, or not."""
    module, _, parameter = _loaded_name(tensor, base).rpartition(".")
    conv1d = is_conv1d(module, base)
    looked_up = any(item.lora is not None and item.lora.transposed and not conv1d for item in tensor.contributions)
    linear = len(tensor.shape) == 2 and parameter == "weight" and module.rpartition(".")[2] not in LOOKUPS
    factors = linear and not looked_up and not RAW.search(tensor.name)
    tied = "lm_head" if module.rpartition(".")[2] in EMBEDDINGS and is_tied(base) else None
    return AdapterPlace(module=module, parameter=parameter, factors=factors, transposed=factors and conv1d, tied=tied)


def _loaded_name(tensor: TensorPlan, base: ModelSource) -> str:
    """As the loaded model calls it: as the adapters do that change it, else as the checkpoint does, with its prefix."""
    parameter = tensor.name.rpartition(".")[2]
    for item in tensor.contributions:
        if item.lora is not None and item.lora.expert is None and ".lora_A." in item.lora.A.name:
            return f"{strip_prefixes(item.lora.A.name).partition('.lora_A.')[0]}.{parameter}"
    outer = OUTER.get(str(base.config.get("model_type")))
    headed = any("For" in str(name) or "LMHead" in str(name) for name in base.config.get("architectures") or ())
    if outer and headed and not any(name.startswith(f"{outer}.") for name in base.tensors):
        return f"{outer}.{tensor.name}"
    return tensor.name


def _default_rank(method: str, tensors: Sequence[TensorPlan]) -> int:
    """The least that vLLM takes and that loses nothing, where the merged ΔW has a rank that headers tell."""
    exact = method in SUMS | BY_FACTORS and all(map(is_low_rank, tensors))
    if not exact:
        return DENSE_RANK
    needed = max((sum(i.lora.rank for i in t.contributions if i.lora) for t in tensors), default=1)
    return next((rank for rank in SERVED_RANKS if rank >= needed), SERVED_RANKS[-1])


def _config(rank: int, places: Sequence[AdapterPlace], base: ModelSource) -> dict[str, Any]:
    """adapter_config.json with one rank for all modules, its scale 1."""
    causal = any("CausalLM" in str(name) or "LMHead" in str(name) for name in base.config.get("architectures") or ())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base.reference,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(places, base),
        "fan_in_fan_out": any(place.transposed for place in places),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def _targets(places: Sequence[AdapterPlace], base: ModelSource) -> list[str]:
    """The modules' last names where those name nothing else in the base, their whole paths where they would."""
    modules = {place.module for place in places}
    names = {module.rpartition(".")[2] for module in modules}
    count = {name: sum(module.rpartition(".")[2] == name for module in modules) for name in names}
    in_base = {name: sum(f".{tensor}".endswith(f".{name}.weight") for tensor in base.tensors) for name in names}
    short = {name for name in names if count[name] == in_base[name]}
    long = {module for module in modules if module.rpartition(".")[2] not in short}
    return sorted(short | long)


def _warnings(
    recipe: Recipe, rank: int, tensors: Sequence[TensorPlan], places: Mapping[str, AdapterPlace]
) -> Iterator[Problem]:
    if rank not in SERVED_RANKS:
        larger = next((served for served in SERVED_RANKS if served >= rank), None)
        advice = f"{larger} is the next that it does." if larger else f"{SERVED_RANKS[-1]} is its largest."
        message = f"vLLM does not take adapters of rank {rank}; {advice}"
        yield Problem(code="parameter_invalid", message=message, where="output.rank")
    others = [tensor.name for tensor in tensors if not places[tensor.name].factors]
    if others and recipe.output.other == "drop":
        message = f"What the sources change in {some(others)} is not in the adapter."
        yield Problem(code="lora_cannot_hold", message=message, where="output.other")
    if others and recipe.output.other == "save":
        message = f"Where {some(others)} changed, the adapter holds it whole: PEFT loads that, vLLM refuses it."
        yield Problem(code="lora_cannot_hold", message=message, where="output.other")


def _kept(tensors: Sequence[TensorPlan]) -> Iterator[TensorPlan]:
    return (tensor for tensor in tensors if tensor.contributions)


def _changed(tensors: Sequence[TensorPlan]) -> Iterator[TensorPlan]:
    return (tensor for tensor in tensors if any(item.changes for item in tensor.contributions))


def _states_change(item: Contribution, resolved: Resolved) -> bool:
    return item.changes and resolved.sources[item.source].model is None
