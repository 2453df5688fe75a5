"""The records' words: statuses with their meaning, the job row and the event row as frozen values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from app.artifacts.manifest import StoredFile
from app.tasks.task import TaskScore


class Kind(StrEnum):
    MERGE = "merge"  # its result is an artifact
    SWEEP = "sweep"  # its result are the scores of its points
    EVALUATION = "evaluation"  # the same, of one point: a model as it is


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
    RESOLVING = "resolving"  # planning again
    DOWNLOADING = "downloading"  # of what the hub has and the worker not yet
    MERGING = "merging"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Of a job, what lists show. Times are the database's clock, UTC."""

    id: str
    kind: Kind
    status: Status
    stage: Stage | None
    queue: str
    priority: int
    owner: str
    labels: Mapping[str, str]
    method: str
    plan_digest: str
    attempt: int
    max_attempts: int
    progress_bytes: int  # of what is not a merge, thousandths of a point
    total_bytes: int
    error: Mapping[str, Any] | None  # {"code","title","message","where","fault","problems"}
    artifact: (
        Mapping[str, Any] | None
    )  # {"manifest_sha256","manifest_key","size","files":[{"name","key","size","sha256"}]}, "evaluation":[TaskScore];
    #    of what is not a merge NO_FILES
    artifact_id: str | None  # the job that made the artifact: this one, or the one whose result is reused
    pinned: bool  # it does not expire
    expires_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime

    @property
    def reused(self) -> bool:
        """Whether another job made the artifact."""
        return self.artifact_id not in (None, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Listed):
    """One row of ``jobs``. ``version`` grows with every write (ETag)."""

    version: int
    recipe: Mapping[str, Any]  # as submitted
    resolved: Mapping[str, Any]  # Plan.recipe
    estimates: Mapping[str, int]
    warnings: tuple[Mapping[str, str], ...]
    lease_token: str | None
    lease_expires_at: datetime | None
    reserved_bytes: int  # of the store, until it is finished
    progress_at: datetime | None
    failures: tuple[Mapping[str, Any], ...]  # {"attempt","at","code","message"}, one for each attempt that failed
    retry_at: datetime | None  # queued, after a failure or without room: the next attempt begins no sooner
    waits_for: str | None  # queued: "disk", while a worker found too little of it
    expires_in: int | None  # seconds after publication
    webhook: Mapping[str, Any] | None  # {"url","events"}: who is told when it ends

    @property
    def artifact_bytes(self) -> int:
        """Of all files of the artifact; 0 before it is published."""
        return int((self.artifact or {}).get("size") or 0)

    @property
    def artifact_keys(self) -> frozenset[str]:
        """Every key in the store that the artifact consists of; none before it is published."""
        artifact = self.artifact or {}
        named = {file["key"] for file in artifact.get("files", [])} | {artifact.get("manifest_key", "")}
        return frozenset(named - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file that some attempt finished: a retry adopts it where its digest still holds.

    ``statistics`` is JSON, and the engine's business: what it needs besides the bytes not to merge them again.
    """

    file: StoredFile
    statistics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One append-only row: what happened to a job. ``id`` orders events, ``type`` is stable, ``data`` JSON."""

    id: int
    job_id: str
    type: str
    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPoint:
    """Something that a sweep scores: a point of its grid, or (``settings`` None) what points are held against.

    ``recipe`` is what somebody would write, ``resolved`` that with every reference pinned, ``plan_digest`` its plan's.
    """

    name: str
    settings: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    resolved: Mapping[str, Any]
    plan_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Of a row of ``points``, what is shown; ``number`` from 0 in the order of scoring. ``scores``: one a task."""

    number: int
    name: str
    settings: Mapping[str, Any] | None
    scores: tuple[TaskScore, ...] | None
    scored_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored:
    """Of a row of ``points`` without scores, what its worker needs."""

    number: int
    resolved: Mapping[str, Any]
    plan_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a submission brings; the database gives the rest. ``expires_in``: seconds after publication.

    ``total_bytes`` are what the merge will write, and what it reserves of the store. ``merges``: the ids of those that
    it reads. ``reuse_key``: an artifact of the same one is the result that it would have. ``points`` are what is
    scored, where the job is no merge.
    """

    recipe: Mapping[str, Any]
    resolved: Mapping[str, Any]
    method: str
    plan_digest: str
    estimates: Mapping[str, int]
    warnings: Sequence[Mapping[str, str]] = ()
    total_bytes: int
    queue: str = "default"
    priority: int = 0
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    max_attempts: int = 3
    pinned: bool = False
    expires_in: int | None = None
    webhook: Mapping[str, Any] | None = None
    kind: Kind = Kind.MERGE
    merges: Collection[str] = ()
    reuse_key: str | None = None
    points: Sequence[NewPoint] = ()

    @property
    def reserves(self) -> int:
        """Bytes of the store."""
        return self.total_bytes if self.kind is Kind.MERGE else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """An ``Idempotency-Key``, unique per ``owner``. ``request_hash`` (sha256 hex) tells requests apart."""

    owner: str
    key: str
    request_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Jobs, newest first. ``next_cursor`` is None on the last page."""

    jobs: tuple[Listed, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a heartbeat brings back."""

    cancel_requested: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """A queued job whose doorbell should be pressed."""

    id: str
    queue: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JanitorReport:
    """One round: the doorbells to press, and the ids that were requeued, failed or closed as cancelled."""

    ring: tuple[Ring, ...]
    requeued: tuple[str, ...]
    failed: tuple[str, ...]
    cancelled: tuple[str, ...]


NO_FILES: Mapping[str, Any] = {"size": 0, "files": []}  # ``Job.artifact`` of what has scores and no artifact
POINT_UNITS = 1000  # of ``progress_bytes`` in one point


class LeaseLost(Exception):  # noqa: N818 — news, not an error
    """The lease token no longer holds the job: somebody else owns it. Nothing was written; stop at once."""


class NoRoom(Exception):  # noqa: N818
    """The store has too little room for a queued job now, and nobody holds it. In bytes: needed, and left for it."""

    def __init__(self, job_id: str, *, needs: int, free: int) -> None:
        super().__init__(f"{job_id} needs {needs} bytes, and the store has {free} left for it")
        self.needs, self.free = needs, free


class CancelRequested(Exception):  # noqa: N818
    """The job is `cancelling`: it can no longer be published, only confirmed as cancelled."""
