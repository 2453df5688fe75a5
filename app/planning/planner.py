"""Recipe + sources → Plan, or every problem at once. Only headers and configs are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import MergeyardError, Problem
from app.planning.fingerprint import canonical_recipe, plan_digest
from app.planning.matching import AdapterMatch, ModelMatch, match_adapter, match_model
from app.planning.parameters import source_parameters, tensor_parameters
from app.planning.plan import (
    Contribution,
    Estimates,
    LoraFactors,
    Plan,
    PlannedSource,
    ShardPlan,
    TensorPlan,
)
from app.planning.warnings import warnings_of
from app.recipe import Recipe, SourceEntry
from app.recipe.grammar import shard_bytes
from app.recipe.methods import METHODS
from app.recipe.values import Position, layer_of
from app.sources.models import read_json
from app.sources.references import split_adapter
from app.sources.resolver import Resolver
from app.sources.safetensors import DTYPE_BYTES, FLOATS
from app.sources.source import ModelSource, SourceFile, TensorSpec

DELTA_BUFFER_BYTES = 512_000_000  # the engine keeps one tensor's Δ of every source up to here, else it recomputes
PROCESS_BYTES = 450_000_000  # what a worker holds before it merges anything: torch, Numba
LIBRARY_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """One entry of ``models``: a full model, an adapter, or (``X+adapter``) both; neither: the base itself."""

    entry: SourceEntry
    where: str
    model: ModelMatch | None
    adapter: AdapterMatch | None
    canonical: Mapping[str, str]  # {"model": …} or {"adapter": …}


def make_plan(recipe: Recipe, resolver: Resolver) -> Plan:
    """Resolve a recipe against real files.

    Raises:
        MergeyardError: with every problem found, each with its place in the recipe.
    """
    base, base_reference = _base(recipe, resolver)
    problems: list[Problem] = []
    sources = []
    for index, entry in enumerate(recipe.models):
        where = f"models[{index}]"
        try:
            resolved = _resolve(entry, where, base, base_reference, resolver)
            if resolved.model or resolved.adapter or METHODS[recipe.merge_method].counts_base:
                sources.append(resolved)
        except MergeyardError as error:
            problems.extend(_placed(error, f"{where}.{'adapter' if entry.adapter else 'model'}"))
    if problems:
        raise MergeyardError.of(problems)
    if not sources:
        message = (
            "Every entry of `models` is the base itself, so nothing changes; name a fine-tuned model or an adapter"
        )
        raise MergeyardError("no_sources", message, where="models")
    tensors = _tensors(recipe, base, sources, problems)
    if problems:
        raise MergeyardError.of(_first_of_each(problems))
    shards = _shards(tensors, shard_bytes(recipe.output.max_shard_size))
    resolved_recipe = canonical_recipe(recipe, base_reference, [(source.canonical, source.entry) for source in sources])
    documents, companions = _documents(base, recipe.file_dtype)
    base_planned = PlannedSource(reference=base_reference, role="base", files=base.files)
    planned = tuple(_planned(source, base_reference, base) for source in sources)
    return Plan(
        method=recipe.merge_method,
        recipe=resolved_recipe,
        base=base_planned,
        sources=planned,
        shards=shards,
        documents=documents,
        companions=companions,
        metadata={"format": "pt"},
        estimates=_estimates(tensors),
        warnings=warnings_of(recipe, tensors, base, [(source.where, source.adapter) for source in sources]),
        digest=plan_digest(resolved_recipe, [base_planned, *planned], companions, documents),
    )


def _base(recipe: Recipe, resolver: Resolver) -> tuple[ModelSource, str]:
    """The base model; for ``linear`` without one, the first source takes its place."""
    if recipe.base_model:
        text, where = recipe.base_model, "base_model"
    else:
        entry = recipe.models[0]
        if entry.model is None or split_adapter(entry.model)[1]:
            message = "Without a `base_model` the first entry must be a full model"
            raise MergeyardError("recipe_invalid", message, where="models[0]")
        text, where = entry.model, "models[0].model"
    if split_adapter(text)[1]:
        message = "A base with an adapter on it is not supported yet; merge the adapter into the base first"
        raise MergeyardError("not_supported", message, where=where)
    try:
        model = resolver.model(text)
    except MergeyardError as error:
        raise MergeyardError.of(_placed(error, where)) from None
    return model, model.reference


def _resolve(
    entry: SourceEntry, where: str, base: ModelSource, base_reference: str, resolver: Resolver
) -> ResolvedSource:
    model_text, adapter_text = split_adapter(entry.model) if entry.model else (None, entry.adapter)
    model: ModelMatch | None = None
    canonical: dict[str, str] = {}
    if model_text is not None:
        reference = resolver.canonical(model_text)
        canonical["model"] = reference
        if reference != base_reference:
            model = match_model(resolver.model(model_text), base)
    adapter: AdapterMatch | None = None
    if adapter_text is not None:
        adapter = match_adapter(resolver.adapter(adapter_text), base)
        reference = adapter.source.reference
        canonical = {"model": f"{canonical['model']}+{reference}"} if model else {"adapter": reference}
    return ResolvedSource(entry=entry, where=where, model=model, adapter=adapter, canonical=canonical)


def _placed(error: MergeyardError, where: str) -> list[Problem]:
    return [
        Problem(code=problem.code, message=problem.message, where=problem.where or where) for problem in error.problems
    ]


def _tensors(
    recipe: Recipe, base: ModelSource, sources: Sequence[ResolvedSource], problems: list[Problem]
) -> list[TensorPlan]:
    layers = _layer_count(base)
    planned = []
    for name, spec in base.tensors.items():
        position = Position(name, layer_of(name), layers)
        floating = spec.dtype in FLOATS
        contributions = []
        for index, source in enumerate(sources):
            full, lora = _changes(source, name) if floating else (None, None)
            if full is None and lora is None and METHODS[recipe.merge_method].sign_elected:
                continue  # takes no part in this tensor (merging-maths)
            own = source_parameters(recipe, source.entry, position)
            contributions.append(Contribution(source=index, full=full, lora=lora, parameters=own))
        touched = floating and any(item.full or item.lora for item in contributions)
        parameters = tensor_parameters(recipe, position)
        # Sources that change nothing still scale the base where a linear merge is not normalised.
        scaled = recipe.merge_method == "linear" and parameters["normalize"] is False and floating
        kept = tuple(contributions) if touched or scaled else ()
        if kept and parameters.get("normalize") is True and recipe.merge_method == "linear":
            problems.extend(_zero_weights(kept, name))
        planned.append(
            TensorPlan(
                name=name,
                shape=spec.shape,
                dtype=(recipe.file_dtype if floating else None) or spec.dtype,
                base=spec,
                contributions=kept,
                parameters=parameters if kept else {},
            )
        )
    if recipe.merge_method == "ties":
        problems.extend(_varying_densities(planned, sources))
    return planned


def _changes(source: ResolvedSource, name: str) -> tuple[TensorSpec | None, LoraFactors | None]:
    full = source.model.tensors.get(name) if source.model else None
    lora = None
    if source.adapter:
        lora = source.adapter.factors.get(name)
        full = source.adapter.saved.get(name, full)
    return full, lora


def _zero_weights(contributions: Sequence[Contribution], name: str) -> list[Problem]:
    if abs(sum(item.parameters["weight"] for item in contributions)) >= 1e-8:
        return []
    message = f"The weights sum to zero at {name}, so they cannot be normalised; set `normalize: false` or change them."
    return [Problem(code="parameter_invalid", message=message, where="parameters.normalize")]


def _varying_densities(tensors: Sequence[TensorPlan], sources: Sequence[ResolvedSource]) -> list[Problem]:
    """A whole-model trim has one threshold for each source, so one density."""
    densities: dict[int, set[float]] = {}
    for tensor in tensors:
        if tensor.parameters.get("trim_scope") == "model":
            for item in tensor.contributions:
                densities.setdefault(item.source, set()).add(item.parameters["density"])
    return [
        Problem(
            code="parameter_invalid",
            message="`trim_scope: model` trims a source over the whole model, so its density cannot vary by tensor.",
            where=f"{sources[index].where}.parameters.density",
        )
        for index, found in densities.items()
        if len(found) > 1
    ]


def _first_of_each(problems: Sequence[Problem]) -> list[Problem]:
    """A problem of a parameter that shows at every tensor is one problem."""
    return list({(problem.code, problem.where): problem for problem in reversed(problems)}.values())[::-1]


def _layer_count(base: ModelSource) -> int:
    found = [layer for name in base.tensors if (layer := layer_of(name)) is not None]
    return max(found) + 1 if found else 0


def _shards(tensors: Sequence[TensorPlan], limit: int) -> tuple[ShardPlan, ...]:
    """Tensors in the base's order, a new file wherever the next one would pass the limit."""
    groups: list[list[TensorPlan]] = []
    size = 0
    for tensor in tensors:
        nbytes = _output_bytes(tensor)
        if not groups or (groups[-1] and size + nbytes > limit):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return (ShardPlan(filename="model.safetensors", tensors=tuple(groups[0])),)
    return tuple(
        ShardPlan(
            filename=f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tensors=tuple(group),
        )
        for number, group in enumerate(groups, start=1)
    )


def _output_bytes(tensor: TensorPlan) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _estimates(tensors: Sequence[TensorPlan]) -> Estimates:
    touched = [tensor for tensor in tensors if tensor.contributions]
    largest = 0
    for tensor in touched:
        count = math.prod(tensor.shape)
        deltas = min(4 * count * len(tensor.contributions), DELTA_BUFFER_BYTES)
        factors = sum(
            4 * (math.prod(item.lora.A.shape) + math.prod(item.lora.B.shape))
            for item in tensor.contributions
            if item.lora
        )
        largest = max(largest, deltas + factors)
    return Estimates(
        output_bytes=sum(_output_bytes(tensor) for tensor in tensors),
        peak_memory_bytes=PROCESS_BYTES + largest,
        tensors=len(tensors),
        tensors_touched=len(touched),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        parameters_touched=sum(math.prod(tensor.shape) for tensor in touched),
    )


def _documents(
    base: ModelSource, file_dtype: str | None
) -> tuple[dict[str, Mapping[str, Any]], tuple[SourceFile, ...]]:
    """config.json with the output's dtype, and companions; `auto_map` names code, so it goes (CVE-2025-66448)."""
    config = {key: value for key, value in base.config.items() if key != "auto_map"}
    if file_dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(keys, LIBRARY_DTYPES[file_dtype]))
    documents: dict[str, Mapping[str, Any]] = {"config.json": config}
    companions = []
    for file in base.companions:
        if file.name.endswith("_config.json"):
            value = read_json(file.path, base.reference)
            if "auto_map" in value:
                documents[file.name] = {key: item for key, item in value.items() if key != "auto_map"}
                continue
        companions.append(file)
    return documents, tuple(companions)


def _planned(source: ResolvedSource, base_reference: str, base: ModelSource) -> PlannedSource:
    files: tuple[SourceFile, ...] = ()
    if source.model:
        files += source.model.source.files
    if source.adapter:
        files += source.adapter.source.files
    reference = source.canonical.get("adapter") or source.canonical["model"]
    role = "model" if "model" in source.canonical else "adapter"
    if reference == base_reference:
        files = base.files
    return PlannedSource(reference=reference, role=role, files=files)
