"""Jobs to test with."""

from __future__ import annotations

import time
from typing import Any

from app.records.database import Database
from app.records.job import Job, NewJob
from app.records.jobs import Jobs

ARTIFACT = {
    "manifest_sha256": "a" * 64,
    "manifest_key": "job/token/mergeyard.json",
    "size": 7,
    "files": [{"name": "mergeyard.json", "key": "job/token/mergeyard.json", "size": 7, "sha256": "a" * 64}],
}


def new_job(**changes: Any) -> NewJob:
    values: dict[str, Any] = {
        "recipe": {"merge_method": "ties"},
        "resolved": {"merge_method": "ties"},
        "method": "ties",
        "plan_digest": "d" * 64,
        "estimates": {"output_bytes": 100},
        "total_bytes": 100,
    }
    return NewJob(**(values | changes))


def claimed(jobs: Jobs, *, lease_seconds: float = 60, **changes: Any) -> Job:
    job, _ = jobs.submit(new_job(**changes))
    running = jobs.claim(job.id, lease_seconds=lease_seconds)
    assert running is not None
    return running


def wait_a_moment(database: Database) -> None:
    """Until the database's clock has moved on: SQLite's counts milliseconds, and rows of one have no order."""
    began = database.now()
    while database.now() == began:
        time.sleep(0.0005)
