"""Processes that take turns: each works on a line that it is sent and answers with a line, while the others wait.

So what slows the machine slows all of them alike, and none has another's memory, caches or threads.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


class Turn:
    """A process of ``python -m MODULE ROLE GIVEN``, from here."""

    def __init__(self, module: str, role: str, given: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", module, role, json.dumps(given)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def take(self, **asked: Any) -> dict[str, Any]:
        """What it answers. RuntimeError where it has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with {self._process.wait(60)}")
        return dict(json.loads(line))

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def asked() -> Iterator[dict[str, Any]]:
    """In such a process: the lines that it is sent, until there are no more."""
    for line in sys.stdin:
        yield dict(json.loads(line))


def tell(**values: Any) -> None:
    """In such a process: the answer to a line."""
    print(json.dumps(values), flush=True)


def peak_memory() -> int:
    """Bytes of resident memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def own_seconds() -> float:
    """Processor time of this process, its children that live, and those that have ended."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total
