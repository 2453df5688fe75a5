"""Jobs to test with."""

from __future__ import annotations

from typing import Any

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
