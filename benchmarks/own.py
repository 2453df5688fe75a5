"""Mergeyard's part of the speed benchmark: ``python -m benchmarks.own merge|unhashed JOB``.

``unhashed`` writes the same files without making the sha256 of the weights. The statistics cannot be turned off: the
merge kernel counts them on the way, so their cost is in both. Neither is given a cache of digests: as in ``mergeyard
merge``, every source file is hashed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from app.artifacts.disk import reserve
from app.artifacts.manifest import StoredFile, TensorStatistics
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from benchmarks.clock import Clock
from benchmarks.job import Job, read_job
from worker.engine.digests import DigestCache
from worker.engine.kernels import load, warm_up
from worker.engine.run import build_manifest, merge_to_folder, run_merge, write_manifest
from worker.engine.sinks import FileWriter, LocalFile


def main() -> None:
    what, job = sys.argv[1], read_job(sys.argv[2])
    kernels = load("auto")
    warm_up(kernels)  # a worker does this once, before its first job
    clock = Clock()
    {"merge": merge, "unhashed": merge_unhashed}[what](job)
    clock.report(device=kernels.name)


def merge(job: Job) -> None:
    """What ``mergeyard merge`` does."""
    merge_to_folder(planned(job), Path(job.out))


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

    def check(self) -> None:
        pass


class UnhashedSink:
    """A Sink that does all that FolderSink does for a file (reserve, write, sync), the sha256 of weights apart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:  # noqa: ARG002
        return None

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:  # noqa: ARG002
        return None

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        pass

    def create(self, filename: str, size: int) -> FileWriter:
        path = self._folder / filename
        if not filename.endswith(".safetensors"):
            return LocalFile(path, name=filename, size=size)  # the engine holds what it copies against its digest
        return UnhashedFile(path, size)


class UnhashedFile:
    """A weight file of an UnhashedSink; its digest is all zeros."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        reserve(self._descriptor, size)

    def write(self, data: memoryview) -> None:
        rest = data.cast("B")
        while len(rest):
            rest = rest[os.write(self._descriptor, rest) :]

    def finish(self) -> StoredFile:
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        return StoredFile(name=self._path.name, key=self._path.name, size=self._size, sha256="0" * 64)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
