"""The plan: a recipe resolved against real files, made from headers alone. Frozen, and the engine's only input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app import strict_json
from app.errors import Problem
from app.sources.safetensors import Entry, header
from app.sources.source import GatheredTensor, RemoteFile, SourceFile, StoredTensor, TensorSpec
from app.tasks.task import Task

Scalar = float | int | bool | str
Document = Mapping[str, Any] | str  # JSON, or a text as it is


def document_bytes(document: Document) -> bytes:
    """As it is written."""
    return document.encode() if isinstance(document, str) else strict_json.file_bytes(document)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """ΔW = scale · B·A of one tensor, as PEFT stores the factors.

    The tensor is seen as a matrix of its first axis by all others (a convolution's, too), or as ``experts`` matrices
    along its first axis. A is (r, in…), B (out, r…); ``transposed`` where the tensor is (in, out), as GPT-2's Conv1D
    and embeddings are. With experts, A is (experts·r, in), rows expert by expert, and B (out, r·experts), the expert
    varying fastest. Where a checkpoint stores experts one by one, ``expert`` is the tensor's and ``first_row`` the
    row of the expert's ΔW that is its first.

    AdaLoRA: B·diag(E)·A with E = ``singular_values`` (r, 1), over the saved ``rank_count`` + 1e-5 where there is one.
    DoRA: m ⊙ (W + scale·B·A) / ‖W + scale·B·A‖ - W with m = ``magnitude``, one for each output, and W the tensor of the
    model that the adapter sits on.
    """

    A: TensorSpec
    B: TensorSpec
    scale: float
    transposed: bool
    experts: int = 1
    expert: int | None = None
    first_row: int = 0
    singular_values: TensorSpec | None = None
    rank_count: TensorSpec | None = None
    magnitude: TensorSpec | None = None

    @property
    def plain(self) -> bool:
        """Whether ΔW is no more than scale·B·A (or its transpose) of two matrices."""
        only = self.singular_values is None and self.rank_count is None and self.magnitude is None
        return only and self.experts == 1 and len(self.A.shape) == 2

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTensor:
    """What is added as it is: ``scale`` · ``tensor``, of the shape of what it is added to."""

    tensor: TensorSpec
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one source changes in one tensor: δ = (full - base, where ``full`` is given) + ΔW of ``lora`` + ``added``.

    Without any, δ is zero and still counts as a source (``linear`` and normalised ``task_arithmetic``
    depend on it). ``parameters`` are the source's own, already resolved to this tensor: ``weight``, ``density`` …
    """

    source: int  # index into Plan.sources
    full: StoredTensor | None
    lora: LoraFactors | None
    parameters: Mapping[str, float]
    added: ScaledTensor | None = None

    @property
    def changes(self) -> bool:
        return self.full is not None or self.lora is not None or self.added is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One output tensor. Without contributions it is copied (cast to ``dtype`` where that differs from the base).

    ``parameters`` are the method's, with the dialect resolved into single choices, for this tensor. For ``ties``:
    ``lambda``, ``normalize``, ``rescale``, ``trim_scope`` (tensor|model), ``min_keep`` (0|1: the least k of a
    density above 0), ``elect`` (mass|count|unanimous|quorum), ``quorum``, ``weights`` (scale: the weight scales δ
    before the trim; vote: before the election; merge: after it), ``divisor`` (agreeing_weights|agreeing|sources),
    ``zero_sum`` (plus|majority). For ``linear`` and ``task_arithmetic``: ``lambda`` (1 for linear), ``normalize``. For
    the others those of app/recipe/methods.py, and where the base is optional ``task_vectors``: whether one was named.
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

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The header of a checkpoint's file."""
        return header([Entry(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors], metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlace:
    """Where an adapter holds a tensor: the ``module`` and ``parameter`` of the loaded model.

    ``factors``: as A (rank, in) and B (out, rank) of a linear layer, of the transposed tensor where it is
    ``transposed``; else only whole, or not at all. ``tied``: the module that shares the tensor and has no
    copy of its own in a checkpoint (an output head); saved whole, PEFT parts the two, so it is saved there too.
    """

    module: str
    parameter: str
    factors: bool
    transposed: bool
    tied: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """The result is an adapter: one ``rank`` for all its modules, and the ``places`` of the merged tensors by name.

    ``other``: what becomes of changed tensors that are no linear layer's: refuse, save (whole) or drop.
    ``min_retained_energy``: of each tensor, the least share of ‖ΔW‖² that its factors must hold.
    """

    rank: int
    min_retained_energy: float | None
    other: Literal["refuse", "save", "drop"]
    places: Mapping[str, AdapterPlace]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """A source as the plan uses it; the worker hashes ``files``.

    ``role`` is ``base``, ``model``, ``adapter`` or ``tokenizer``.
    """

    reference: str
    role: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTask:
    """A task that the result is scored on: its examples, as they were read from the file with this ``sha256``.

    ``limit``: of them, the first ones are taken; None: all.
    """

    task: Task
    reference: str
    sha256: str
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What the merge will take: bytes written, peak memory in bytes, tensors and parameters changed.

    ``scratch_bytes``: what earlier documents write beside the result, until it is finished.
    """

    output_bytes: int
    scratch_bytes: int = 0
    peak_memory_bytes: int
    tensors: int
    tensors_touched: int
    parameters: int
    parameters_touched: int

    @property
    def disk_bytes(self) -> int:
        """The most that is on the disk at once."""
        return self.output_bytes + self.scratch_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything the engine needs.

    ``method`` is the merge method; ``sources`` are the recipe's sources in order (the base is not one of them,
    unless the method counts it); ``base`` is the model whose files and config the result takes.
    ``tokenizers`` are the models whose vocabulary was read, with the files it was read from.
    ``companions`` are copied as they are; ``documents`` are files written anew: ``config.json`` (with the output's
    dtype and vocabulary), what the tokenizer changes, and any config that named code to run, without that.
    ``recipe`` is the resolved recipe: every reference canonical, every default written out; JSON-ready.
    ``digest`` is a sha256 over the resolved recipe, the pins of every file and the engine's version, and the merge's
    fingerprint. ``adapter``: the result is written as one; ``shards`` is then its one file, and its tensors are those
    of the base that change. ``warnings`` are problems that do not stop the merge.

    ``earlier`` are the merges whose results this one reads, in the order in which they are made; a plan of theirs has
    none itself, and is known by its ``reference`` to those that read it. Its shards hold what it changes: the rest is
    read from where it lies.

    ``tasks``: what the result is scored on before it is published.
    """

    method: str
    recipe: Mapping[str, Any]
    base: PlannedSource
    sources: tuple[PlannedSource, ...]
    tokenizers: tuple[PlannedSource, ...]
    shards: tuple[ShardPlan, ...]
    documents: Mapping[str, Document]
    companions: tuple[SourceFile, ...]
    metadata: Mapping[str, str]  # the safetensors metadata of every output shard
    estimates: Estimates
    warnings: tuple[Problem, ...]
    digest: str
    adapter: AdapterPlan | None = None
    earlier: tuple[Plan, ...] = ()
    reference: str | None = None
    tasks: tuple[PlannedTask, ...] = ()

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def remote(self) -> tuple[RemoteFile, ...]:
        """What is read and still on the hub. While there is any, nothing can be merged."""
        files = [
            file
            for document in (*self.earlier, self)
            for source in (document.base, *document.sources, *document.tokenizers)
            for file in source.files
        ]
        return tuple(dict.fromkeys(file.remote for file in files if file.remote is not None))

    def owner(self, stored: StoredTensor) -> str:
        """The reference of the model or adapter that a tensor is read from (all of them, if several), for messages."""
        files = {part.file for part in (stored.parts if isinstance(stored, GatheredTensor) else (stored,))}
        owners = [item.reference for item in (self.base, *self.sources) if not files.isdisjoint(item.files)]
        return " and ".join(dict.fromkeys(owners)) or stored.name
