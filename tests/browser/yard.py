"""A served API without keys, and a worker in this process, for pages with real merges behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.database import Database
from app.records.job import Job, Stage
from app.settings import Settings
from app.sources.hub.hub import Hub, HubSettings
from tests import servers, tiny
from tests.api.serving import ServedApi, serving
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.job import Ending, Workplace, work
from worker.lease import StopRequest

LAYERS = 6


def recipe(density: float = 0.5, **changes: Any) -> dict[str, Any]:
    models = [{"adapter": f"models:{name}", "parameters": {"density": density}} for name in tiny.ADAPTERS]
    return {"base_model": f"models:{tiny.BASE}", "merge_method": "ties", "models": models, **changes}


@dataclass(frozen=True)
class Yard:
    """A served API without keys, and a worker in this process."""

    api: ServedApi
    place: Workplace

    def submit(self, asked: dict[str, Any] | None = None, **envelope: Any) -> str:
        response = self.api.http.post("/merges", json={"recipe": asked or recipe(), "force": True, **envelope})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def merged(self, asked: dict[str, Any] | None = None, **envelope: Any) -> str:
        job_id = self.submit(asked, **envelope)
        assert work(self.place, job_id, StopRequest()) is Ending.PUBLISHED
        return job_id

    def running(self, **envelope: Any) -> Job:
        job = self.api.jobs.claim(self.submit(**envelope), lease_seconds=3600, worker="gpu-host-1")
        assert job is not None
        self.api.jobs.set_stage(job.id, job.lease_token or "", Stage.MERGING)
        self.progress(job, 30_000_000)
        return job

    def progress(self, job: Job, done: int) -> None:
        self.api.jobs.heartbeat(
            job.id, job.lease_token or "", lease_seconds=3600, progress_bytes=done, total_bytes=100_000_000
        )

    def failed(self) -> str:
        job_id = self.submit()
        while (job := self.api.jobs.claim(job_id, lease_seconds=60, worker="gpu-host-1")) is not None:
            error = MergeyardError("out_of_memory", "The worker has too little memory for this merge.")
            self.api.jobs.fail(job_id, job.lease_token or "", error, retry=True)
        return job_id

    def cancelled(self) -> str:
        job_id = self.submit()
        self.api.jobs.request_cancel(job_id)
        return job_id

    def in_state(self, state: str) -> str:
        made = {
            "queued": self.submit,
            "running": lambda: self.running().id,
            "succeeded": self.merged,
            "failed": self.failed,
            "cancelled": self.cancelled,
        }
        return made[state]()


@contextmanager
def opened(folder: Path, sqlite_template: Path) -> Iterator[Yard]:
    """A yard with tiny models in ``folder``, on a copy of a migrated database."""
    root = folder / "models"
    tiny.write_llama(root / tiny.BASE, layers=LAYERS)
    for seed, name in enumerate(tiny.ADAPTERS, start=1):
        tiny.write_lora(root / tiny.BASE, root / name, seed=seed)
    path = folder / "records.sqlite3"
    path.write_bytes(sqlite_template.read_bytes())
    with servers.short_folder() as short, servers.valkey(short / "valkey.sock") as broker:
        settings = Settings(
            data_dir=folder / "data",
            database_url=f"sqlite:///{path}",
            broker_url=broker,
            model_roots=str(root),
            janitor_seconds=3600,
        )
        Database(settings.database).close()
        with serving(settings) as api, closing(Hub(HubSettings.of(settings))) as hub:
            place = Workplace(
                settings=settings,
                hub=hub,
                jobs=api.jobs,
                bell=Bell(broker),
                store=api.store,
                kernels=load("reference"),
                digests=DigestCache(None),
                worker="gpu-host-1",
            )
            yield Yard(api, place)
