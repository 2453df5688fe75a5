"""One merge with the time of each kind of its work: ``python -m benchmarks.spans JOB``, which benchmarks.profile runs.

Nothing in the engine knows of this: functions are wrapped here, from outside, and each call asks its thread's clock
twice. What is nested counts once, in the innermost. A block's work calls a few of them, so they cost well under a
hundredth of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import own
from benchmarks.job import read_job
from worker.engine import digests, run, sinks, tensors, trimming
from worker.engine.bracket import Collected
from worker.engine.deltas import Deltas, TensorDeltas
from worker.engine.kernels import load, warm_up
from worker.engine.kernels.cpu import CpuKernels
from worker.engine.kernels.signature import Delta, Difference, Product
from worker.engine.reader import Reader

PLANNING, OPENING, SAMPLING = "planning", "opening factors", "sampling for brackets"
READING, FORMING = "reading (page cache to memory)", "forming δ alone"
COLLECTING, SELECTING = "collecting near the thresholds (δ formed on the way)", "the k-th of what was collected"
HISTOGRAMS, MERGING = "histograms and equals", "merging (δ formed on the way)"
COPYING = "checking what no source changes"
READING_TO_HASH, HASHING_SOURCES = "reading sources to hash them", "sha256 of the sources"
WRITING, HASHING_RESULT, SYNCING = "writing (memory to page cache)", "sha256 of the result", "fsync"
PUBLISHING = "card, index and manifest"
STAGES = (PLANNING, SYNCING, PUBLISHING)
KEPT = (*STAGES, MERGING)  # of which it is kept when each call began and ended

Amount = Callable[..., tuple[int, int]]  # of a call's arguments: bytes, or values of δ; and float32 operations


@dataclass
class Kind:
    """Of one kind of work on threads of one name: seconds of processor time and by the clock, calls, bytes or values
    of δ, and the float32 operations that form those."""

    processor: float = 0.0
    wall: float = 0.0
    calls: int = 0
    amount: int = 0
    operations: int = 0


@dataclass
class Spans:
    """``times``: when each call of a kind in ``KEPT`` began and ended, by the monotonic clock. ``threads``: names."""

    kinds: dict[tuple[str, str], Kind] = field(default_factory=lambda: defaultdict(Kind))
    times: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    threads: dict[int, str] = field(default_factory=dict)
    _nested: threading.local = field(default_factory=threading.local)

    def call(self, kind: str, amount: Amount | None, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function`` and count it."""
        stack: list[list[float]] = self._nested.__dict__.setdefault("stack", [])
        stack.append([0.0, 0.0])
        wall, processor = time.monotonic(), time.thread_time()
        try:
            return function(*args)
        finally:
            ended = time.monotonic()
            took, walled = time.thread_time() - processor, ended - wall
            inner_took, inner_walled = stack.pop()
            if stack:
                stack[-1][0] += took
                stack[-1][1] += walled
            own_kind = self.kinds[role_of(threading.current_thread().name), kind]
            own_kind.processor += took - inner_took
            own_kind.wall += walled - inner_walled
            own_kind.calls += 1
            if amount:
                counted, operations = amount(*args)
                own_kind.amount += counted
                own_kind.operations += operations
            if kind in KEPT:
                self.times[kind].append((wall, ended))

    def wrap(self, owner: Any, name: str, kind: str, amount: Amount | None = None) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            return self.call(kind, amount, functools.partial(function, **named), *args)

        setattr(owner, name, timed)


class TimedDigest:
    """A sha256 whose updates count as ``kind``."""

    def __init__(self, spans: Spans, kind: str, first: bytes = b"") -> None:
        self._spans, self._kind, self._digest = spans, kind, hashlib.sha256(first)

    def update(self, data: memoryview, /) -> None:
        self._spans.call(self._kind, lambda given: (given.nbytes, 0), self._digest.update, data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class TimedHashlib:
    """What a module sees as hashlib."""

    def __init__(self, spans: Spans, kind: str) -> None:
        self._spans, self._kind = spans, kind

    def sha256(self, first: bytes = b"") -> TimedDigest:
        return TimedDigest(self._spans, self._kind, first)


def main() -> None:
    job = read_job(sys.argv[1])
    kernels = load("cpu")
    warm_up(kernels)
    spans = Spans()
    spans.threads[threading.get_native_id()] = role_of(threading.current_thread().name)
    wrap_engine(spans)
    began, processor = time.monotonic(), time.process_time()
    own.merge(job)
    ended = time.monotonic()
    print(
        json.dumps(
            {
                "began": began,
                "ended": ended,
                "processor": time.process_time() - processor,
                "threads": spans.threads,
                "kinds": [{"role": role, "kind": kind, **asdict(found)} for (role, kind), found in spans.kinds.items()],
                "times": spans.times,
            }
        ),
        flush=True,
    )


def wrap_engine(spans: Spans) -> None:
    def run_named(thread: threading.Thread, run_thread: Callable[[threading.Thread], None]) -> None:
        spans.threads[threading.get_native_id()] = role_of(thread.name)
        run_thread(thread)

    thread_run = threading.Thread.run
    threading.Thread.run = lambda thread: run_named(thread, thread_run)  # type: ignore[method-assign]
    spans.wrap(own, "planned", PLANNING)
    spans.wrap(Deltas, "open", OPENING)
    spans.wrap(TensorDeltas, "sample", SAMPLING)
    spans.wrap(trimming, "bracket", SAMPLING)
    spans.wrap(Reader, "_fill", READING, lambda _reader, _spec, _start, out: (out.nbytes, 0))
    spans.wrap(CpuKernels, "form", FORMING)
    spans.wrap(CpuKernels, "collect", COLLECTING, lambda _kernels, deltas, *_: _formed(deltas))
    spans.wrap(CpuKernels, "histogram", HISTOGRAMS)
    spans.wrap(CpuKernels, "count_equal", HISTOGRAMS)
    spans.wrap(CpuKernels, "merge", MERGING, lambda _kernels, _base, deltas, *_: _formed(deltas))
    spans.wrap(Collected, "largest", SELECTING)
    spans.wrap(tensors, "all_finite", COPYING, lambda values: (values.nbytes, 0))
    spans.wrap(digests, "hash_file", READING_TO_HASH, lambda file, _stop: (file.size, 0))
    digests.hashlib = TimedHashlib(spans, HASHING_SOURCES)  # type: ignore[assignment]
    spans.wrap(sinks.LocalFile, "write", WRITING, lambda _file, data: (data.nbytes, 0))
    sinks.hashlib = TimedHashlib(spans, HASHING_RESULT)  # type: ignore[assignment]
    spans.wrap(os, "fsync", SYNCING)
    spans.wrap(run, "_write_small_files", PUBLISHING)


def _formed(deltas: Sequence[Delta]) -> tuple[int, int]:
    values = operations = 0
    for delta in deltas:
        match delta:
            case Product(left, right):
                values += len(left) * right.shape[1]
                operations += 2 * left.shape[1] * len(left) * right.shape[1]
            case Difference(own_values):
                values += len(own_values)
            case _:
                values += len(delta)
    return values, operations


def role_of(thread: str) -> str:
    """What a thread is for, by its name."""
    return {"MainThread": "main"}.get(thread, thread.rstrip("0123456789").rstrip("_-"))


if __name__ == "__main__":
    main()
