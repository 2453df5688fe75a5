"""Feeds damaged files to the functions that the API reads sources with: python -m tests.fuzz (make fuzz).

Every input must end as an answer or a MergeyardError with a known code, within SECONDS of computing, in a process
that may take MEMORY bytes more than it had when it began. Input n of a seed is always the same.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from app.errors import CODES, MergeyardError
from tests.fuzz.yard import Yard

SECONDS = 20.0  # of computing, for the largest inputs; the median is a millisecond
MEMORY = 1 << 30
WALL_SECONDS = 300.0  # after which an input hangs, whatever the machine is busy with


@dataclass
class Outcome:
    """``ended``: how often each kind of input ended in which way. ``failures``: input number and what went wrong."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0


def fuzz(inputs: range, seed: int, folder: Path) -> Outcome:
    """Run the inputs of these numbers, in files below ``folder``."""
    yard = Yard(folder)
    outcome = Outcome()
    for number in inputs:
        random = Random(f"{seed}:{number}")
        kind, feed = random.choices(
            (("header", yard.header), ("adapter", yard.adapter), ("model", yard.model)), (5, 4, 1)
        )[0]
        read = feed(random)
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        started = time.process_time()
        ended = _run(read)
        seconds = time.process_time() - started
        faulthandler.cancel_dump_traceback_later()
        outcome.slowest = max(outcome.slowest, seconds)
        if seconds > SECONDS:
            ended = f"took {seconds:.1f} s"
        if ended != "accepted" and ended not in CODES:
            outcome.failures.append((number, ended))
            ended = "FAILED"
        outcome.ended[kind, ended] += 1
    outcome.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return outcome


def _run(read: Callable[[], object]) -> str:
    """``accepted``, the refusal's code, or the trace of whatever else was raised."""
    try:
        read()
    except MergeyardError as error:
        answer = json.dumps([problem.as_json() for problem in error.problems], ensure_ascii=False).encode()
        return error.code if len(answer) < 1_000_000 and error.status < 500 else f"a bad refusal: {error.code}"
    except Exception:
        return traceback.format_exc()
    return "accepted"


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more than it has; beyond them it meets MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to run one again")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limit_memory(MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(range(options.first, options.first + options.inputs), options.seed, Path(folder).resolve())
    for (kind, ended), count in sorted(outcome.ended.items()):
        print(f"{kind:8} {ended:24} {count:8}")
    print(
        f"{sum(outcome.ended.values())} inputs of seed {options.seed}: {len(outcome.failures)} failed; the slowest "
        f"took {outcome.slowest:.2f} s of at most {SECONDS:g}; the process {outcome.peak >> 20} MiB at its peak, "
        f"of at most {MEMORY >> 20} beside what it began with"
    )
    for number, what in outcome.failures[:10]:
        print(f"--- input {number}\n{what}")
    sys.exit(bool(outcome.failures))


if __name__ == "__main__":
    main()
