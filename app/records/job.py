"""The records' words: statuses with their meaning, the job row and the event row as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    QUEUED = "queued"  # accepted; waits for a worker
    RUNNING = "running"  # a worker holds its lease
    CANCELLING = "cancelling"  # asked to stop; its worker has not let go yet
    SUCCEEDED = "succeeded"  # the artifact is published
    FAILED = "failed"  # `error` says why
    CANCELLED = "cancelled"  # stopped on request; nothing was published

    @property
    def finished(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Stage(StrEnum):
    RESOLVING = "resolving"  # planning again, hashing sources
    MERGING = "merging"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of ``jobs``. Times are the database's clock, UTC. ``version`` grows with every write (the ETag)."""

    id: str
    kind: str  # "merge"; later "sweep", "evaluation"
    status: Status
    stage: Stage | None
    version: int
    queue: str
    priority: int
    owner: str
    labels: Mapping[str, str]
    recipe: Mapping[str, Any]  # as submitted
    resolved: Mapping[str, Any]  # Plan.recipe
    method: str
    plan_digest: str
    estimates: Mapping[str, int]
    warnings: tuple[Mapping[str, str], ...]
    attempt: int
    max_attempts: int
    lease_token: str | None
    lease_expires_at: datetime | None
    progress_bytes: int
    total_bytes: int
    progress_at: datetime | None
    error: Mapping[str, Any] | None  # {"code","title","message","where","fault","problems"}
    artifact: Mapping[str, Any] | None  # {"manifest_sha256","manifest_key","size","files":[{"name","key","size","sha256"}]}
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One append-only row: what happened to a job. ``id`` orders events; ``type`` is stable, ``data`` is JSON."""

    id: int
    job_id: str
    type: str
    at: datetime
    data: Mapping[str, Any]
