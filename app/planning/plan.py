"""The plan: a recipe resolved against real files, made from headers alone. Frozen, and the engine's only input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import Problem
from app.sources.source import GatheredTensor, SourceFile, StoredTensor, TensorSpec

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """ΔW = scale · B·A, transposed where the base stores (in, out), as GPT-2's Conv1D does."""

    A: TensorSpec  # (r, in)
    B: TensorSpec  # (out, r)
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one source changes in one tensor: δ = (full - base, where ``full`` is given) + ΔW of ``lora``.

    With neither, δ is zero and still counts as a source (``linear`` and normalised ``task_arithmetic``
    depend on it). ``parameters`` are the source's own, already resolved to this tensor: ``weight``, ``density``.
    """

    source: int  # index into Plan.sources
    full: StoredTensor | None
    lora: LoraFactors | None
    parameters: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One output tensor. Without contributions it is copied (cast to ``dtype`` where that differs from the base).

    ``parameters`` are the method's, with the dialect resolved into single choices, for this tensor. For ``ties``:
    ``lambda``, ``normalize``, ``rescale``, ``trim_scope`` (tensor|model), ``min_keep`` (0|1: the least k of a
    density above 0), ``elect`` (mass|count|unanimous|quorum), ``quorum``, ``weights`` (scale: the weight scales δ
    before the trim; vote: before the election; merge: after it), ``divisor`` (agreeing_weights|agreeing|sources),
    ``zero_sum`` (plus|majority). For ``linear`` and ``task_arithmetic``: ``lambda`` (1 for linear), ``normalize``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: StoredTensor
    contributions: tuple[Contribution, ...]
    parameters: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file and the tensors it holds, in file order."""

    filename: str
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """A source as the plan uses it. ``role`` is ``base``, ``model`` or ``adapter``; the worker hashes ``files``."""

    reference: str
    role: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What the merge will take: bytes written, peak memory in bytes, tensors and parameters changed."""

    output_bytes: int
    peak_memory_bytes: int
    tensors: int
    tensors_touched: int
    parameters: int
    parameters_touched: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything the engine needs.

    ``method`` is the merge method; ``sources`` are the recipe's sources in order (the base is not one of them,
    unless the method counts it); ``base`` is the model whose files and config the result takes.
    ``companions`` are copied as they are; ``documents`` are JSON files written anew: ``config.json`` (with the output's
    dtype, without ``auto_map``) and any companion that named code to run.
    ``recipe`` is the resolved recipe: every reference canonical, every default written out; JSON-ready.
    ``digest`` is a sha256 over the resolved recipe, the pins of every file and the engine's version, and the merge's
    fingerprint. ``warnings`` are problems that do not stop the merge.
    """

    method: str
    recipe: Mapping[str, Any]
    base: PlannedSource
    sources: tuple[PlannedSource, ...]
    shards: tuple[ShardPlan, ...]
    documents: Mapping[str, Mapping[str, Any]]
    companions: tuple[SourceFile, ...]
    metadata: Mapping[str, str]  # the safetensors metadata of every output shard
    estimates: Estimates
    warnings: tuple[Problem, ...]
    digest: str

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    def owner(self, stored: StoredTensor) -> str:
        """The reference of the model or adapter that a tensor is read from (all of them, if several), for messages."""
        files = {part.file for part in (stored.parts if isinstance(stored, GatheredTensor) else (stored,))}
        owners = [item.reference for item in (self.base, *self.sources) if not files.isdisjoint(item.files)]
        return " and ".join(dict.fromkeys(owners)) or stored.name
