"""A small yard for the worker's tests: settings, records, a janitor, and worker processes that can be killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from app.artifacts.opening import open_store
from app.artifacts.store import ArtifactStore
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.bell import Bell
from app.records.database import Database
from app.records.janitor import Janitor
from app.records.job import Job, NewJob
from app.records.jobs import Jobs
from app.records.owned import resolver_of
from app.settings import Settings
from app.sources.hub.hub import Hub, HubSettings
from app.sources.resolver import Resolver
from tests import tiny

REPOSITORY = Path(__file__).parents[2]
SHARDED: dict[str, Any] = {"output": {"max_shard_size": "8KB"}}
PATIENCE = 150.0  # seconds: a busy machine's, where Celery's pauses before it connects anew grow to half a minute


@dataclass(frozen=True, slots=True, kw_only=True)
class Yard:
    """Everything but the workers."""

    settings: Settings
    jobs: Jobs
    bell: Bell
    store: ArtifactStore
    janitor: Janitor
    hub: Hub

    def submit(
        self,
        recipe: Mapping[str, Any] | None = None,
        *,
        ring: bool = True,
        max_attempts: int = 3,
        owner: str = "local",
        **changes: Any,
    ) -> Job:
        """A merge (of the tiny model, with ``changes``, unless told), as the API submits one."""
        recipe = recipe or tiny.recipe(**changes)
        plan = make_plan(parse_recipe(recipe), self.resolver(owner))
        job, _ = self.jobs.submit(
            NewJob(
                recipe=recipe,
                resolved=plan.recipe,
                method=plan.method,
                plan_digest=plan.digest,
                estimates=asdict(plan.estimates),
                total_bytes=plan.estimates.disk_bytes,
                queue=self.settings.queue,
                max_attempts=max_attempts,
                owner=owner,
            )
        )
        if ring:
            self.bell.ring(job.id, job.queue)
        return job

    def resolver(self, owner: str) -> Resolver:
        return resolver_of(owner, settings=self.settings, jobs=self.jobs, store=self.store, hub=self.hub)

    def finish(self, job: Job, *, seconds: float = PATIENCE) -> Job:
        """The job, once it is finished."""
        self.until(lambda: self.jobs.get(job.id).status.finished, seconds)
        return self.jobs.get(job.id)

    def until_shards(self, job: Job, count: int) -> None:
        """Wait until an attempt has recorded ``count`` shards, and is still merging."""
        self.until(lambda: len(self.jobs.shards(job.id)) >= count)
        assert not self.jobs.get(job.id).status.finished, "too fast to be caught in the middle"

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.05)

    def kinds(self, job: Job) -> list[str]:
        """The types of the job's events but for stages and shards."""
        return [event.type for event in self.jobs.events(job.id) if event.type not in ("stage", "shard")]

    def processes(self, job: Job) -> list[int]:
        """The process of each claim."""
        return [event.data["process"] for event in self.jobs.events(job.id) if event.type == "claimed"]

    def files(self, job: Job) -> list[str]:
        return list(self.store.keys(job.id))


@contextmanager
def open_yard(
    folder: Path, models: Path, broker_url: str, queue: str, *, tidy: bool = True, **settings: Any
) -> Iterator[Yard]:
    """A yard (on SQLite, unless told) with its own models and a janitor that comes by twice a second (``tidy``)."""
    shutil.copytree(models, folder / "models")
    values: dict[str, Any] = {
        "data_dir": folder / "data",
        "broker_url": broker_url,
        "model_roots": str(folder / "models"),
        "lease_seconds": 2.0,
        "retry_seconds": 0.0,
        "threads": 1,
        "queue": queue,
    }
    made = Settings(**(values | settings))
    database, bell = Database(made.database), Bell(made.broker)
    database.migrate()
    jobs, store = Jobs(database), open_store(made)
    janitor = Janitor(jobs, bell, 0.5, store)
    hub = Hub(HubSettings.of(made))
    if tidy:
        janitor.start()
    try:
        yield Yard(settings=made, jobs=jobs, bell=bell, store=store, janitor=janitor, hub=hub)
    finally:
        janitor.stop()
        hub.close()
        bell.close()
        database.close()


@contextmanager
def worker(
    yard: Yard, *, stderr: IO[str] | int = subprocess.DEVNULL, on: Sequence[str] = (), **changes: Any
) -> Iterator[psutil.Popen]:
    """A worker process; whatever is left of it and of its pool is killed at the end.

    ``on``: the command that runs it elsewhere, as the same process. ``changes``: of the settings, for it alone.
    """
    settings = yard.settings.model_copy(update=changes)
    process = psutil.Popen(
        [*on, sys.executable, "-m", "tests.worker.slow_worker", settings.model_dump_json()],
        cwd=REPOSITORY,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else [process]
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(10)


def pool_child(yard: Yard, job: Job) -> psutil.Process:
    """The process that works on the job."""
    return psutil.Process(yard.processes(job)[-1])
