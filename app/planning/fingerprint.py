"""What makes two merges the same: the resolved recipe, and one digest over all that decides the result's bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import app
from app.planning.plan import Document, PlannedSource
from app.planning.resolving import Resolved, ResolvedPart
from app.recipe import Recipe
from app.recipe.methods import METHODS, MethodSpec
from app.sources.references import is_immutable
from app.sources.source import SourceFile
from app.sources.tokenizers import TOKENIZER_JSON

ENGINE_VERSION = "5"  # grows whenever the same recipe would give other bytes


def canonical_recipe(recipe: Recipe, found: Resolved) -> dict[str, Any]:
    """The resolved recipe: every reference canonical, every default of the method written out."""
    spec = METHODS[recipe.merge_method]
    shared = {
        name: recipe.parameters.get(name, parameter.default)
        for name, parameter in spec.parameters.items()
        # a weight for all sources would make a base that is not listed a source of `linear`, as in mergekit
        if not parameter.ignored and (name in recipe.parameters or not parameter.per_source or spec.base != "ignored")
    }
    resolved: dict[str, Any] = {
        "base_model": found.base.reference,
        "merge_method": recipe.merge_method,
        "parameters": {name: value for name, value in shared.items() if value is not None},
        "output": recipe.output.settled(recipe.output.rank),
    }
    parts = {part.module: _part(part, spec) for part in found.parts}
    resolved.update(parts.get(None, {"modules": parts}))
    if spec.base != "required" and recipe.base_model is None:
        del resolved["base_model"]  # named, it would be what the models are merged around, and lend rows to tokens
    if wanted := recipe.out_dtype or recipe.dtype:
        resolved["out_dtype"] = wanted
    if recipe.chat_template:
        resolved["chat_template"] = recipe.chat_template
    if recipe.name:
        resolved["name"] = recipe.name
    return resolved


def _part(part: ResolvedPart, spec: MethodSpec) -> dict[str, Any]:
    """A module, or the whole recipe's ``models`` or ``slices``."""
    first = part.spans[0]
    value: dict[str, Any] = {}
    if first.count is None:
        value["models"] = [dict(entry) for entry in first.entries]
    else:
        value["slices"] = [
            {
                "sources": [dict(entry) for entry in span.entries],
                **({"base_model": span.own_base} if span.own_base else {}),
                "parameters": spec.used(span.parameters),
            }
            for span in part.spans
        ]
    if part.module is not None:
        value["parameters"] = spec.used(part.parameters)
    return value


def plan_digest(
    resolved: Mapping[str, Any],
    sources: Sequence[PlannedSource],
    companions: Sequence[SourceFile],
    documents: Mapping[str, Document],
    earlier: Iterable[str],
) -> str:
    """sha256 of canonical JSON: the recipe but its name, what pins each file, and what would change the bytes.

    ``earlier``: the digests of the plans that make the models which are read and not there yet.

    A tokenizer.json, which may have 30 MB, is left out: it follows from the recipe and from pinned files.
    """
    pins = [
        [
            source.reference,
            source.role,
            [[file.header_sha256, file.size, _moment(source, file)] for file in source.files],
        ]
        for source in sources
    ]
    value = {
        "engine": ENGINE_VERSION,
        "version": app.__version__,
        "recipe": {key: item for key, item in resolved.items() if key != "name"},
        "sources": pins,
        "earlier": sorted(earlier),
        "companions": [[file.name, file.header_sha256] for file in companions],
        "documents": {name: document for name, document in documents.items() if name != TOKENIZER_JSON},
    }
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _moment(source: PlannedSource, file: SourceFile) -> int:
    """What tells a file from a later one of equal header and size."""
    return 0 if is_immutable(source.reference) else file.mtime_ns
