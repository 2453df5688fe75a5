"""The named stages of a merge, and how a worker's child is stopped at one of them: a rendezvous in a folder.

The suite arms a stage (``want.STAGE`` appears); the first child that comes to it takes the file for itself
(``at.STAGE.JOB.PID``) and waits until the suite removes it. A rename has one winner, so a stop catches one child.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAGES = (
    "claimed",  # the row is the attempt's, nothing else has happened
    "planned",  # planned again, no file begun
    "mid-shard",  # part of a weight file's bytes are written
    "stored",  # a weight file is durable and not yet recorded
    "recorded",  # a weight file is durable and recorded
    "manifest",  # every file is durable, the manifest too
    "closing",  # just before the write that publishes
    "closed",  # just after it; what the attempt left is not cleaned up yet
)
LONGEST_STOP = 30.0  # a suite that forgot somebody must not hold it for ever


@dataclass(frozen=True)
class Stop:
    """A child that waits at a stage."""

    stage: str
    job_id: str
    pid: int
    marker: Path

    def release(self) -> None:
        self.marker.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stops:
    folder: Path

    def arm(self, stage: str) -> None:
        """The next child that comes to the stage waits there."""
        (self.folder / f"want.{stage}").touch()

    def disarm(self) -> None:
        """Nobody is to be caught any more, and who waits goes on."""
        for path in [*self.folder.glob("want.*"), *self.folder.glob("at.*")]:
            path.unlink(missing_ok=True)

    def waiting(self) -> list[Stop]:
        """Every child that waits now."""
        found = []
        for marker in self.folder.glob("at.*"):
            _, stage, job_id, pid = marker.name.split(".")
            found.append(Stop(stage, job_id, int(pid), marker))
        return found

    def reach(self, stage: str, job_id: str) -> None:
        """What the child calls."""
        mine = self.folder / f"at.{stage}.{job_id}.{os.getpid()}"
        try:
            (self.folder / f"want.{stage}").rename(mine)
        except FileNotFoundError:
            return
        deadline = time.monotonic() + LONGEST_STOP
        while mine.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
