"""A plan in, files into a sink: the engine's public face. Knows no database, no HTTP and no queue."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import torch

import app
from app import strict_json
from app.artifacts.manifest import MANIFEST_NAME, EarlierRecord, Manifest, SourceRecord, StoredFile, TensorStatistics
from app.errors import NO_SPACE, MergeyardError
from app.planning.adapter_output import CONFIG_NAME
from app.planning.budgets import DELTA_BYTES
from app.planning.earlier import file_of
from app.planning.plan import Plan, PlannedSource, document_bytes
from app.sources.models import INDEX
from app.sources.references import model_of
from app.sources.safetensors import read_header
from app.sources.source import SourceFile
from app.tasks.task import TaskScore
from worker.engine.adapter_output import adapter_config
from worker.engine.blocks import Crew
from worker.engine.card import CARD_NAME, model_card
from worker.engine.checkpoint import index_of, write_file
from worker.engine.digests import DigestCache, SourceDigests
from worker.engine.kernels import load
from worker.engine.kernels.signature import Kernels
from worker.engine.meter import Control, Meter
from worker.engine.reader import Reader, moved, open_unmoved
from worker.engine.sinks import FolderSink, ScratchFolder, Sink
from worker.engine.stream import Stream

_PIECE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOutput:
    """What a merge wrote (all files but the manifest), read and found; ``earlier`` of the documents before the last.

    ``versions``: of what calculated it.
    """

    files: tuple[StoredFile, ...]
    sources: tuple[SourceRecord, ...]
    statistics: Mapping[str, TensorStatistics]
    earlier: tuple[EarlierRecord, ...]
    versions: Mapping[str, str]
    evaluation: tuple[TaskScore, ...]


class Evaluate(Protocol):
    """Scores the plan's tasks on the checkpoint in ``folder``, whose files have the names of the artifact's."""

    def __call__(self, folder: Path, control: Control, /) -> tuple[TaskScore, ...]: ...


def run_merge(
    plan: Plan,
    sink: Sink,
    *,
    kernels: Kernels,
    threads: int = 0,
    control: Control,
    digests: DigestCache,
    evaluate: Evaluate | None = None,
    delta_budget: int = DELTA_BYTES,
) -> MergeOutput:
    """Merge into ``sink``: weights, index, config, companions and the model card.

    ``threads`` 0 takes every core; neither it nor ``delta_budget`` (bytes of Δ kept between passes) changes a byte of
    the result. ``evaluate`` is called once all is written but the model card, which has its scores.

    Raises MergeyardError (``source_changed``, ``source_format``, ``source_not_finite``, ``result_not_finite``,
    ``disk_full``, ``out_of_memory``) or what ``control.check`` or ``evaluate`` raised.
    """
    with _user_errors(plan), contextlib.ExitStack() as stack:
        control.stage("merging")
        hashing = stack.enter_context(SourceDigests(_source_files(plan), digests))
        crew = stack.enter_context(Crew(threads))
        reader = stack.enter_context(Reader())
        # what is read back is opened by its real path, as all sources are
        scratch = stack.enter_context(sink.scratch()).resolve() if plan.earlier else Path()
        folders = [scratch / str(number) for number in range(len(plan.earlier))]
        sinks = [*(ScratchFolder(folder, keep_free=sink.keep_free) for folder in folders), sink]
        streams = [
            Stream(document, own, kernels=kernels, crew=crew, reader=reader, delta_budget=delta_budget)
            for document, own in zip((*plan.earlier, plan), sinks, strict=True)
        ]
        shards, found = _write_weights(plan, streams, scratch, control, hashing, reader)
        sha256 = hashing.result(control.check)
        reader.verify()
        control.stage("publishing" if evaluate is None else "evaluating")
        sources = _source_records(plan, plan.earlier, sha256)
        earlier = tuple(
            _earlier_record(document, plan.earlier, own, sha256)
            for document, own in zip(plan.earlier, found, strict=False)
        )
        small = _write_small_files(plan, sink, found[-1])
        scores: tuple[TaskScore, ...] = ()
        if evaluate is not None:
            with sink.readable((*shards, *small)) as folder:
                scores = evaluate(folder, control)
            control.stage("publishing")
        card = model_card(plan, sources, earlier, found[-1], scores).encode()
        small.append(write_file(sink, CARD_NAME, card))
    return MergeOutput(
        files=(*shards, *small),
        sources=sources,
        statistics=found[-1],
        earlier=earlier,
        versions=versions(kernels),
        evaluation=scores,
    )


def build_manifest(plan: Plan, output: MergeOutput) -> Manifest:
    """The manifest of what ``run_merge`` wrote."""
    return Manifest(
        fingerprint=plan.digest,
        recipe=plan.recipe,
        sources=output.sources,
        files=output.files,
        statistics=output.statistics,
        earlier=output.earlier,
        evaluation=output.evaluation,
        versions=output.versions,
        warnings=tuple(warning.as_json() for warning in plan.warnings),
    )


def write_manifest(manifest: Manifest, sink: Sink) -> StoredFile:
    """``mergeyard.json``, the last file of an artifact."""
    return write_file(sink, MANIFEST_NAME, strict_json.file_bytes(manifest.as_json()))


def merge_to_folder(
    plan: Plan,
    out: Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    digests: DigestCache | None = None,
    evaluate: Callable[[str], Evaluate | None] | None = None,
    delta_budget: int = DELTA_BYTES,
) -> Manifest:
    """Merge into the folder ``out``, which appears whole or not at all. ``evaluate`` is told the kernels' room.

    Raises what ``run_merge`` raises, ``output_exists``, and ``not_supported`` for a device that this machine has not.
    """
    with _user_errors(plan), FolderSink(out, needs=plan.estimates.disk_bytes) as sink:
        kernels = load(device)
        output = run_merge(
            plan,
            sink,
            kernels=kernels,
            threads=threads,
            control=_Onlooker(on_progress),
            digests=digests or DigestCache(None),
            evaluate=evaluate(kernels.name) if evaluate is not None else None,
            delta_budget=delta_budget,
        )
        manifest = build_manifest(plan, output)
        write_manifest(manifest, sink)
        sink.publish()
    return manifest


def versions(kernels: Kernels) -> dict[str, str]:
    """Of the engine and of what it calculates with; in the ``cuda`` room the GPU's name and what drives it, too.

    Of that room on a machine without a GPU, where Triton's interpreter carries it out, only Triton.
    """
    libraries = {name: version(name) for name in ("numba", "numpy", "torch")}
    if kernels.name == "cuda":
        libraries["triton"] = version("triton")
        if torch.cuda.is_available():
            libraries |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return {"mergeyard": app.__version__, "python": platform.python_version(), **libraries}


@dataclass(frozen=True, slots=True)
class _Onlooker:
    """A Control that only watches."""

    on_progress: Callable[[int, int], None] | None

    def stage(self, name: str) -> None:
        pass

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(bytes_done, bytes_total)

    def scored(self, score: TaskScore) -> None:
        pass

    def check(self) -> None:
        pass


@contextlib.contextmanager
def _user_errors(plan: Plan) -> Iterator[None]:
    """What the operating system says of space and memory, as errors with a code."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise MergeyardError(
            "disk_full",
            f"The merge needs {plan.estimates.disk_bytes} bytes, and the output's disk or quota has no room left "
            f"({error.strerror}); free some space and merge again.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise MergeyardError(
            "out_of_memory",
            "The GPU has too little free memory for this merge; end what else uses it (nvidia-smi lists that), or use "
            "the device cpu.",
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for this on the CPU
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MergeyardError(
            "out_of_memory",
            f"The merge takes about {plan.estimates.peak_memory_bytes} bytes of memory, more than there is.",
        ) from error


def _write_weights(
    plan: Plan,
    streams: list[Stream],
    scratch: Path,
    control: Control,
    hashing: SourceDigests,
    reader: Reader,
) -> tuple[list[StoredFile], list[Mapping[str, TensorStatistics]]]:
    """Document after document. The result's weight files, and the statistics of each document."""
    before, whole = 0, sum(stream.total for stream in streams)
    shards: list[StoredFile] = []
    found: list[Mapping[str, TensorStatistics]] = []
    for number, document in enumerate((*plan.earlier, plan)):
        stream = streams.pop(0)  # with what it keeps in memory
        shards, statistics = stream.run(Meter(control, hashing, stream.total, before=before, whole=whole))
        before += stream.total
        found.append(statistics)
        if document is not plan:
            _settle(document, shards, scratch / str(number), reader, hashing)
    return shards, found


def _settle(plan: Plan, shards: Sequence[StoredFile], folder: Path, reader: Reader, hashing: SourceDigests) -> None:
    """What an earlier document made is there for those that read it."""
    for shard, stored in zip(plan.shards, shards, strict=True):
        planned = file_of(plan, shard)
        reader.settle(planned, read_header(folder / shard.filename, planned.name).file)
        hashing.settle(planned, stored.sha256)


def _source_files(plan: Plan) -> Iterator[SourceFile]:
    """Every file that is read and there already: all but what earlier documents make."""
    made = _made(plan.earlier)
    for document in (*plan.earlier, plan):
        for source in _sources(document):
            yield from (file for file in source.files if file not in made)


def _made(earlier: Sequence[Plan]) -> frozenset[SourceFile]:
    return frozenset(file_of(document, shard) for document in earlier for shard in document.shards)


def _source_records(plan: Plan, earlier: Sequence[Plan], digests: Mapping[SourceFile, str]) -> tuple[SourceRecord, ...]:
    """The base first, then the sources in the recipe's order, then what only lent its vocabulary.

    Files that an earlier document left as they are stand with its own sources alone: of several models, they may have
    one name.
    """
    names = {document.reference for document in earlier}
    read = {file for document in earlier for source in _sources(document) for file in source.files}
    told = read - _made(earlier)

    def record(source: PlannedSource) -> SourceRecord:
        left_alone = told if names & {source.reference, model_of(source.reference)} else frozenset()
        files = {file.name: digests[file] for file in source.files if file not in left_alone}
        return SourceRecord(reference=source.reference, role=source.role, files=files)

    return tuple(map(record, _sources(plan)))


def _sources(plan: Plan) -> tuple[PlannedSource, ...]:
    return (plan.base, *plan.sources, *plan.tokenizers)


def _earlier_record(
    plan: Plan, earlier: Sequence[Plan], statistics: Mapping[str, TensorStatistics], digests: Mapping[SourceFile, str]
) -> EarlierRecord:
    return EarlierRecord(
        name=str(plan.reference),
        fingerprint=plan.digest,
        sources=_source_records(plan, earlier, digests),
        statistics=statistics,
    )


def _write_small_files(
    plan: Plan,
    sink: Sink,
    statistics: Mapping[str, TensorStatistics],
) -> list[StoredFile]:
    """Index, documents and companions, in an order that the plan alone decides."""
    own = {name: document_bytes(document) for name, document in plan.documents.items()}
    if (index := index_of(plan)) is not None:
        own[INDEX] = index
    if plan.adapter is not None:
        own[CONFIG_NAME] = strict_json.file_bytes(adapter_config(plan, plan.adapter, statistics))
    stored = [write_file(sink, name, content) for name, content in own.items()]
    reserved = {*own, INDEX, CARD_NAME, MANIFEST_NAME, *(shard.filename for shard in plan.shards)}
    for companion in plan.companions:
        if companion.name not in reserved:
            content = companion.content
            copied = _copy(companion, sink) if content is None else write_file(sink, companion.name, content)
            stored.append(copied)
    return stored


def _copy(companion: SourceFile, sink: Sink) -> StoredFile:
    """Byte for byte, in pieces. Raises ``source_changed`` where the bytes are not the planned ones."""
    writer = sink.create(companion.name, companion.size)
    try:
        with os.fdopen(open_unmoved(companion, with_header=False), "rb") as stream:
            while piece := stream.read(_PIECE):
                writer.write(memoryview(piece))
        stored = writer.finish()
    except BaseException:
        writer.abort()
        raise
    if stored.sha256 != companion.header_sha256:
        raise moved(companion)
    return stored
