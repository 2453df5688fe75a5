"""A plan → the model that it will have made, for the plans of the documents that read it.

Only what a document changes is written, into files that last as long as the merge, and in float32 unless the document
says otherwise. Whatever it leaves as it is, later documents read from where it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from app.planning.output import cut_shards, output_bytes
from app.planning.plan import Plan, ShardPlan, TensorPlan, document_bytes
from app.recipe import Recipe
from app.recipe.grammar import shard_bytes
from app.sources.source import ModelSource, SourceFile, TensorSpec

CONFIG = "config.json"
NARROW = frozenset({"F16", "BF16"})


def as_earlier(plan: Plan, document: Recipe, reference: str) -> tuple[Plan, ModelSource]:
    """The plan with what it has to write alone, and the model that it makes, called ``reference``."""
    kept = {tensor.name: spec for tensor in plan.tensors if (spec := _kept(tensor, document))}
    changed = [_widened(tensor, document) for tensor in plan.tensors if tensor.name not in kept]
    made = replace(
        plan,
        shards=cut_shards(changed, shard_bytes(document.output.max_shard_size)) if changed else (),
        documents={},
        companions=(),
        estimates=replace(plan.estimates, output_bytes=sum(map(output_bytes, changed))),
        reference=reference,
    )
    found = kept | {spec.name: spec for shard in made.shards for spec in _specs(made, shard)}
    tensors = {tensor.name: found[tensor.name] for tensor in plan.tensors}
    config = plan.documents[CONFIG]
    assert isinstance(config, Mapping)
    model = ModelSource(
        reference=reference,
        tensors=tensors,
        config=config,
        files=tuple(dict.fromkeys(spec.file for spec in tensors.values())),
        companions=(*plan.companions, *_small_files(plan)),
        digest=plan.digest,
        lasting={tensor.name: tensor.dtype for tensor in plan.tensors if tensor.dtype != tensors[tensor.name].dtype},
    )
    return made, model


def file_of(plan: Plan, shard: ShardPlan) -> SourceFile:
    """A weight file of an earlier document, before it is there. The plan's digest says what will be in it."""
    place = f"{plan.digest}/{shard.filename}"
    return SourceFile(
        name=f"{plan.reference}/{shard.filename}",
        path=Path(place),
        size=len(shard.header(plan.metadata)) + sum(map(output_bytes, shard.tensors)),
        mtime_ns=0,
        header_sha256=hashlib.sha256(place.encode()).hexdigest(),
    )


def _kept(tensor: TensorPlan, document: Recipe) -> TensorSpec | None:
    """Where the tensor lies already, if nothing changes it and no value is rounded."""
    spec = tensor.base
    if tensor.contributions or not isinstance(spec, TensorSpec):
        return None
    exact = tensor.dtype == spec.dtype or (tensor.dtype == "F32" and spec.dtype in NARROW)
    return replace(spec, name=tensor.name) if exact or document.file_dtype is None else None


def _widened(tensor: TensorPlan, document: Recipe) -> TensorPlan:
    """A document that names no type of its own is rounded once, with the result."""
    if document.file_dtype is None and tensor.dtype in NARROW:
        return replace(tensor, dtype="F32")
    return tensor


def _specs(plan: Plan, shard: ShardPlan) -> Iterator[TensorSpec]:
    """The tensors of a weight file at the places that they will have in it."""
    file = file_of(plan, shard)
    offset = len(shard.header(plan.metadata))
    for tensor in shard.tensors:
        nbytes = output_bytes(tensor)
        yield TensorSpec(
            name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, file=file, offset=offset, nbytes=nbytes
        )
        offset += nbytes


def _small_files(plan: Plan) -> Iterator[SourceFile]:
    """What the document writes anew beside its config."""
    for name, document in plan.documents.items():
        if name != CONFIG:
            content = document_bytes(document)
            yield SourceFile(
                name=name,
                path=Path(f"{plan.digest}/{name}"),
                size=len(content),
                mtime_ns=0,
                header_sha256=hashlib.sha256(content).hexdigest(),
                content=content,
            )
