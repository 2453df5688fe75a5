"""What a reference resolves to: files on this machine, their tensors, and what an adapter's config says of them.

Everything here is read from headers and configs; no weights are read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file that is elsewhere: at the ``origin`` hub, of a ``repository`` at a ``commit``; in the artifact store or in
    another bucket, of what a reference (``repository``) names, under a ``key``.

    ``digest`` is its sha256 in hex, or of a small one of the hub the id that git gives it (sha1). Of a bucket's file
    nobody knows it: then ``etag`` says which version is meant, and ``digest`` is a name for that and nothing more.
    """

    origin: Literal["hub", "store", "bucket"] = "hub"
    repository: str
    commit: str
    name: str
    size: int
    digest: str
    key: str = ""
    etag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file and what pins it: a file whose size, mtime or header differs later is another file.

    ``name`` is what the file is called inside its model; ``path`` leads to its bytes and may be called anything, as in
    a hub cache, where names are links to blobs. ``header_sha256`` is that of a safetensors header (length prefix
    and JSON), or of the whole file for others.

    What another document of the recipe will have made is a file too, before it is there. A small one has its
    ``content`` from the start; of weights ``header_sha256`` stands for the plan that makes them.

    ``remote``: the weights are still there; ``path`` has the header alone, which is enough for a plan.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    header_sha256: str
    content: bytes | None = field(default=None, compare=False, repr=False)
    remote: RemoteFile | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFiles:
    """A source's files: the names users see → real paths, of those that are ``remote`` with the header alone."""

    files: Mapping[str, Path]
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's place in a file: safetensors ``dtype`` (``BF16``), ``shape``, absolute ``offset`` and ``nbytes``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive rows of a GatheredTensor, ``start`` up to ``start + count``.

    Each of ``parts`` is a tensor and the first of its rows that goes here. A row is the mean of its parts' rows; with
    no parts it is zero.
    """

    start: int
    count: int
    parts: tuple[tuple[TensorSpec, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredTensor:
    """A tensor put together from rows (index of the first axis) of stored ones: vocabularies that grew or were united.

    ``runs`` cover every row once, in order, but the last ``padding`` ones, each of which is the mean of all rows before
    them. Rows of all parts have the shape ``shape[1:]``. ``dtype`` is what the tensor is read as: that of its parts
    where they agree and no row is a mean, else F32, so that nothing is rounded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    padding: int = 0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """Every stored tensor it takes rows from, once."""
        return tuple(dict.fromkeys(spec for run in self.runs for spec, _ in run.parts))


StoredTensor = TensorSpec | GatheredTensor
Part = TypeVar("Part")  # what rows are taken from: a tensor, or what stands for one
Row = tuple[tuple[TensorSpec, int], ...]  # the tensors a row is the mean of, and the row's index in each


def gathered(name: str, rows: Iterable[Row], row_shape: tuple[int, ...]) -> GatheredTensor:
    """A tensor of these rows, each of ``row_shape``."""
    return assembled(name, joined(rows), row_shape)


def joined(rows: Iterable[tuple[tuple[Part, int], ...]]) -> list[tuple[int, int, tuple[tuple[Part, int], ...]]]:
    """Neighbours that stay neighbours as one: (start, count, the parts of the first)."""
    runs: list[tuple[int, int, tuple[tuple[Part, int], ...]]] = []
    parts: tuple[tuple[Part, int], ...] | None = None
    start, index = 0, -1
    for index, row in enumerate(rows):
        if parts is not None and row == tuple((part, first + index - start) for part, first in parts):
            continue
        if parts is not None:
            runs.append((start, index - start, parts))
        start, parts = index, row
    if parts is not None:
        runs.append((start, index + 1 - start, parts))
    return runs


def row_of(stored: StoredTensor, index: int) -> Row:
    """A row in terms of stored tensors. Not for ``padding``."""
    if isinstance(stored, TensorSpec):
        return ((stored, index),)
    run = stored.runs[bisect_right(stored.runs, index, key=lambda run: run.start) - 1]
    return tuple((spec, first + index - run.start) for spec, first in run.parts)


def assembled(
    name: str,
    runs: Iterable[tuple[int, int, tuple[tuple[TensorSpec, int], ...]]],
    row_shape: tuple[int, ...],
    padding: int = 0,
) -> GatheredTensor:
    """The tensor of ``joined`` rows, and ``padding`` more that are their mean."""
    made = tuple(Run(start=start, count=count, parts=parts) for start, count, parts in runs)
    dtypes = {spec.dtype for run in made for spec, _ in run.parts}
    plain = len(dtypes) == 1 and not padding and all(len(run.parts) < 2 for run in made)
    count = made[-1].start + made[-1].count if made else 0
    return GatheredTensor(
        name=name,
        dtype=dtypes.pop() if plain else "F32",
        shape=(count + padding, *row_shape),
        runs=made,
        padding=padding,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A full model: every tensor by name, ``config.json``, and the files that travel with it untouched.

    ``lasting``: the types that tensors are to have in the end, where they are stored in a wider one until then.
    ``digest``: of the plan that will make the model, where it is not there yet.
    """

    reference: str
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]  # the weight shards, in the index's order
    companions: tuple[SourceFile, ...]  # config, generation config, tokenizer, chat template
    lasting: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What an adapter's config says of one parameter: its rank, and the factor of B·A."""

    rank: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """The factors of one adapted module, ΔW = scale · B·A in float32, as PEFT names and shapes them.

    A (r, in) and B (out, r) of a linear layer; A (r, in, k…) and B (out, r, 1…) of a convolution; A (r, V) and B (d, r)
    of an ``embedding``, whose ΔW is transposed; A (experts·r, in) and B (out, r·experts) of a parameter of experts.
    ``magnitude`` is DoRA's m, ``bias`` that of B (``lora_bias``). AdaLoRA has ``singular_values`` E (r, 1), and
    divides by ``rank_count`` (1,) where that was saved.

    ``scalings`` are of the parameters these factors may belong to, by name inside the module: ``weight``, or with
    ``target_parameters`` those that the config names; which of them it is, only the base's shapes tell.
    """

    module: str
    A: TensorSpec
    B: TensorSpec
    scalings: Mapping[str, Scaling]
    embedding: bool = False
    magnitude: TensorSpec | None = None
    bias: TensorSpec | None = None
    singular_values: TensorSpec | None = None
    rank_count: TensorSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Rows that replace those of an embedding, row i the one of token ``indices[i]``: ``rows`` (tokens, d)."""

    module: str
    indices: tuple[int, ...]
    rows: TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """A PEFT adapter: its LoRA modules, and the tensors that were saved outright.

    ``saved`` holds what ``modules_to_save`` and ``bias`` replaced, ``tokens`` what ``trainable_token_indices`` did.
    Module names are the adapter's own, with PEFT's wrapping prefixes stripped.
    """

    reference: str
    config: Mapping[str, Any]
    modules: tuple[LoraModule, ...]
    saved: Mapping[str, TensorSpec]
    tokens: tuple[TokenRows, ...]
    fan_in_fan_out: bool
    files: tuple[SourceFile, ...]


Source = ModelSource | AdapterSource
