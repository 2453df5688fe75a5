"""Attempts in this process: a yard that nobody else works in, and merges that something happens to on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.records.job import Job
from tests.worker.yard import Yard, open_yard
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.job import Ending, Workplace, work
from worker.lease import StopRequest


@contextmanager
def lonely_yard(folder: Path, models: Path, **settings: Any) -> Iterator[Yard]:
    """No worker, no broker, and no janitor either: nobody but the test touches the rows."""
    with open_yard(folder, models, f"redis+socket://{folder}/nobody.sock", "default", tidy=False, **settings) as opened:
        yield opened


def place_in(yard: Yard) -> Workplace:
    return Workplace(
        settings=yard.settings,
        jobs=yard.jobs,
        bell=yard.bell,
        hub=yard.hub,
        store=yard.store,
        kernels=load("reference"),
        digests=DigestCache(None),
        worker="test-1",
    )


class Interrupting:
    """Kernels that do something just before they merge their ``count``-th block."""

    def __init__(self, action: Any, count: int = 8) -> None:
        self._kernels, self._action, self._left = load("reference"), action, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def merge(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self._action()
        return self._kernels.merge(*arguments)


def failing(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


def attempt(place: Workplace, job: Job, action: Any = None, **changes: Any) -> Ending:
    kernels = place.kernels if action is None else Interrupting(action, **changes)
    return work(replace(place, kernels=kernels), job.id, StopRequest())  # type: ignore[arg-type]


def digests(yard: Yard, job: Job) -> dict[str, str]:
    artifact = yard.jobs.get(job.id).artifact
    assert artifact is not None
    return {file["name"]: file["sha256"] for file in artifact["files"]}
