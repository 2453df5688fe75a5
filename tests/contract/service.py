"""The service as ``mergeyard up`` runs it, a process with a broker and a worker of its own, and who holds its keys."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

from app.records.database import Database
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests.cli.commands import MERGEYARD, environment
from tests.worker.yard import REPOSITORY

START_SECONDS = 90.0
STOP_SECONDS = 60.0
# Two owners that must not see each other, one's key that may only look, a scraper, and somebody who may do everything.
KEYS: Mapping[str, tuple[str, tuple[Scope, ...]]] = {
    "alice": ("alice", (Scope.MERGE, Scope.READ)),
    "bob": ("bob", (Scope.MERGE, Scope.READ)),
    "reader": ("alice", (Scope.READ,)),
    "scraper": ("monitoring", (Scope.METRICS,)),
    "admin": ("operators", (Scope.ADMIN,)),
}


@dataclass(frozen=True)
class Service:
    """``keys`` are texts by holder; there are none in a service that answers its own machine alone."""

    url: str
    settings: Settings
    keys: Mapping[str, str]

    @property
    def faults(self) -> list[str]:
        """What the processes' logs have of things that nobody caught."""
        lines = [line for log in (self.settings.root / "logs").glob("*.log") for line in log.read_text().splitlines()]
        return [line for line in lines if "Traceback" in line or ("ERROR" in line and "failed (request" in line)]


@contextmanager
def running(folder: Path, models: Path, database_url: str, *, with_keys: bool) -> Iterator[Service]:
    """A service that has started, and is told to stop at the end."""
    settings = Settings(
        data_dir=folder,
        database_url=database_url,
        model_roots=str(models),
        port=0,
        device="cpu",
        threads=1,
        lease_seconds=10.0,
        rate_requests=1_000_000,  # counted, and never reached: a 429 would hide what is behind it
        rate_writes=1_000_000,
        rate_failures=1_000_000,
    )
    folder.mkdir(parents=True)
    database = Database(settings.database)
    database.migrate()
    keys = make_keys(database) if with_keys else {}
    database.close()
    values = settings.model_dump(mode="json", exclude={"queue", "host"})
    given = environment(
        **{f"MERGEYARD_{name.upper()}": str(value) for name, value in values.items() if value not in ("", None)}
    )
    said = (folder / "up.log").open("w")
    process = subprocess.Popen(
        [*MERGEYARD, "up"], cwd=REPOSITORY, env=given, stdout=subprocess.PIPE, stderr=said, text=True
    )
    try:
        yield Service(_ready(process), settings, keys)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
        said.close()


def make_keys(database: Database) -> dict[str, str]:
    """A key for every holder of ``KEYS``."""
    keys, by = Keys(database), Caller(owner="cli")
    return {name: keys.create(owner=owner, scopes=scopes, by=by).text for name, (owner, scopes) in KEYS.items()}


def _ready(process: subprocess.Popen[str]) -> str:
    """The URL in the line that says the service is ready."""
    assert process.stdout is not None
    lines: Queue[str] = Queue()
    Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    line = lines.get(timeout=START_SECONDS)
    assert "is ready at" in line, f"the service did not start: {line!r}"
    return line.split()[-1]
