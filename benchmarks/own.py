"""Mergeyard's part of the speed benchmark: ``python -m benchmarks.own merge|known|unhashed JOB``.

``unhashed`` writes the same files without making the sha256 of the weights. The statistics cannot be turned off: the
merge kernel counts them on the way, so their cost is in both. In both every source file is hashed, as in the first
merge of a source. ``known`` is a later one: the cache that workers keep has the digests, made before the clock starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from app.tasks.task import TaskScore
from benchmarks.clock import Clock
from benchmarks.job import Job, read_job
from worker.engine.digests import DigestCache, SourceDigests
from worker.engine.kernels import load, warm_up
from worker.engine.run import build_manifest, merge_to_folder, run_merge, write_manifest
from worker.engine.sinks import AttemptFolder, LocalFile


def main() -> None:
    what, job = sys.argv[1], read_job(sys.argv[2])
    kernels = load("auto")
    warm_up(kernels)  # a worker does this once, before its first job
    digests = DigestCache(Path(job.scratch) / "digests" if what == "known" else None)
    if what == "known":
        hash_sources(planned(job), digests)
    clock = Clock()
    if what == "unhashed":
        merge_unhashed(job)
    else:
        merge(job, digests)
    clock.report(device=kernels.name)


def hash_sources(plan: Plan, digests: DigestCache) -> None:
    """What an earlier merge of them leaves in the cache."""
    files = (file for source in (plan.base, *plan.sources, *plan.tokenizers) for file in source.files)
    with SourceDigests(files, digests) as hashing:
        hashing.result(lambda: None)


def merge(job: Job, digests: DigestCache | None = None) -> None:
    """What ``mergeyard merge`` does."""
    merge_to_folder(planned(job), Path(job.out), digests=digests)


def merge_unhashed(job: Job) -> None:
    out = Path(job.out)
    out.mkdir()
    plan, sink = planned(job), UnhashedSink(out)
    output = run_merge(plan, sink, kernels=load("auto"), control=Unwatched(), digests=DigestCache(None))
    write_manifest(build_manifest(plan, output), sink)


def planned(job: Job) -> Plan:
    return make_plan(parse_recipe(Path(job.recipe).read_text()), Resolver(local=Path(job.base).parent))


class Unwatched:
    """A Control that lets everything pass."""

    def stage(self, name: str) -> None:
        pass

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        pass

    def scored(self, score: TaskScore) -> None:
        pass

    def check(self) -> None:
        pass


class UnhashedSink(AttemptFolder):
    """A Sink that does all that a folder's does (reserve, write, sync), the sha256 of weights apart."""

    def create(self, filename: str, size: int) -> LocalFile:
        if filename.endswith(".safetensors"):
            return UnhashedFile(self._folder / filename, name=filename, size=size)
        return super().create(filename, size)  # the engine holds what it copies against its digest


class UnhashedFile(LocalFile):
    """A file whose digest is all zeros."""

    def __init__(self, path: Path, *, name: str, size: int) -> None:
        super().__init__(path, name=name, size=size)
        self._digest = NoDigest()


class NoDigest:
    """What a file asks of its digest, for nothing."""

    def update(self, data: memoryview, /) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


if __name__ == "__main__":
    main()
