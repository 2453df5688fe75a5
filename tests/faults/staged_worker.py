"""A worker whose child can be stopped at every named stage: its records and its store say where it is. A module to run.

``MERGEYARD_TEST_STOPS`` names the rendezvous' folder (``tests.faults.stages``). All else is the real worker.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from celery import current_app
from celery.signals import worker_process_init

import worker.tasks  # noqa: F401 — the real doorbell, whose workplace this module wraps
from app.artifacts.manifest import MANIFEST_NAME
from app.artifacts.store import LocalStore
from app.records.bell import TASK
from app.records.database import Database
from app.records.job import Job
from app.records.jobs import Jobs
from app.settings import Settings
from tests.faults.stages import Stops
from worker.celery import run_worker

STOPS = "MERGEYARD_TEST_STOPS"


class Stage:
    """Where the child's one job is."""

    def __init__(self, stops: Stops) -> None:
        self._stops = stops
        self.job_id = ""

    def __call__(self, stage: str) -> None:
        if self.job_id:
            self._stops.reach(stage, self.job_id)


class StagedJobs(Jobs):
    def __init__(self, database: Database, stage: Stage) -> None:
        super().__init__(database)
        self._stage = stage

    def claim(self, job_id: str, **values: Any) -> Job | None:
        self._stage.job_id = ""
        job = super().claim(job_id, **values)
        self._stage.job_id = job_id if job is not None else ""
        self._stage("claimed")
        return job

    def set_stage(self, job_id: str, token: str, stage: str) -> Job:
        """Of an attempt, "merging" begins when its plan is made."""
        if stage == "merging":
            self._stage("planned")
        return super().set_stage(job_id, token, stage)

    def record_shard(self, *values: Any) -> None:
        self._stage("stored")
        super().record_shard(*values)
        self._stage("recorded")

    def publish(self, *values: Any, **options: Any) -> Job:
        self._stage("closing")
        done = super().publish(*values, **options)
        self._stage("closed")
        return done


class StagedStore(LocalStore):
    def __init__(self, folder: Path, stage: Stage) -> None:
        super().__init__(folder)
        self._stage = stage

    def create(self, key: str, size: int = 0) -> Any:
        return StagedWriter(super().create(key, size), key, self._stage)


class StagedWriter:
    def __init__(self, writer: Any, key: str, stage: Stage) -> None:
        self._writer, self._key, self._stage = writer, key, stage
        self._writes = 0

    def write(self, data: Any) -> None:
        self._writes += 1
        rest = memoryview(data).cast("B")
        if self._writes == 2 and self._key.endswith(".safetensors"):  # the first is the header
            self._writer.write(rest[: len(rest) // 2])
            self._stage("mid-shard")
            rest = rest[len(rest) // 2 :]
        self._writer.write(rest)

    def close(self) -> None:
        self._writer.close()
        if self._key.endswith(f"/{MANIFEST_NAME}"):
            self._stage("manifest")

    def abort(self) -> None:
        self._writer.abort()


@worker_process_init.connect
def tell_stages(**_: Any) -> None:
    doorbell = current_app.tasks[TASK]
    place = doorbell.place
    stage = Stage(Stops(Path(os.environ[STOPS])))
    doorbell.place = replace(
        place, jobs=StagedJobs(place.jobs.database, stage), store=StagedStore(place.store.folder, stage)
    )


if __name__ == "__main__":
    run_worker(Settings(), tasks="tests.faults.staged_worker")
