"""The runs made so far, a JSON line each beside the cases: a long benchmark can be resumed, and shown again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.watch import Watched


@dataclass(frozen=True, kw_only=True)
class Run:
    """``temporary``: bytes on disk beyond the result. ``began``: UTC. ``load``: the load average before it began."""

    case: str
    participant: str
    round: int
    began: str
    load: float
    commit: str
    watched: Watched
    temporary: int

    @property
    def done(self) -> bool:
        return self.watched.outcome == "done"


class Runs:
    """All runs of one folder. A line that was cut short is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs = [run for line in path.read_text().splitlines() if (run := _read(line))] if path.exists() else []

    def add(self, run: Run) -> None:
        self._runs.append(run)
        with self._path.open("a") as stream:
            stream.write("\n" + json.dumps(asdict(run)))  # begins a line, whatever the last run left unfinished

    def forget(self, participants: Iterable[str]) -> None:
        """Drop all runs of some participants, so that they are made again."""
        self._runs = [run for run in self._runs if run.participant not in set(participants)]
        self._path.write_text("".join("\n" + json.dumps(asdict(run)) for run in self._runs))

    def all(self) -> Sequence[Run]:
        return self._runs

    def of(self, case: str, participant: str) -> list[Run]:
        """In the order of the rounds."""
        found = [run for run in self._runs if (run.case, run.participant) == (case, participant)]
        return sorted(found, key=lambda run: run.round)

    def seconds(self, case: str, participant: str) -> float | None:
        """The median of the runs that ended; None where none did."""
        times = [run.watched.seconds for run in self.of(case, participant) if run.done]
        return median(times) if times else None


def _read(line: str) -> Run | None:
    try:
        read: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return Run(**read | {"watched": Watched(**read["watched"])})
