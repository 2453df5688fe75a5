"""What the service answers, as the client hands it on: documents with known keys."""

from __future__ import annotations

from typing import Any, TypedDict

from mergeyard.errors import Problem


class Progress(TypedDict):
    bytes_done: int
    bytes_total: int
    fraction: float


class Failure(TypedDict):
    code: str
    title: str
    detail: str
    where: str
    fault: str
    problems: list[Problem]


class ArtifactSummary(TypedDict):
    size: int
    files: int
    manifest_sha256: str


class JobSummary(TypedDict):
    """What lists show of any kind of job. Times are ISO 8601 in UTC."""

    id: str
    kind: str
    owner: str
    status: str
    stage: str | None
    method: str
    queue: str
    priority: int
    labels: dict[str, str]
    attempt: int
    max_attempts: int
    error: Failure | None
    pinned: bool
    expires_at: str | None
    fingerprint: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    updated_at: str
    urls: dict[str, str]


class MergeSummary(JobSummary):
    """A merge as lists show it."""

    progress: Progress
    artifact: ArtifactSummary | None
    reused: bool


class FailedAttempt(TypedDict):
    attempt: int
    at: str
    code: str
    message: str


class Webhook(TypedDict):
    url: str
    events: list[str]


class Score(TypedDict):
    name: str
    metric: str
    score: float
    standard_error: float
    examples: int


class JobDetails(TypedDict):
    """What the documents of all kinds have beside their summary."""

    failures: list[FailedAttempt]
    retry_at: str | None
    webhook: Webhook | None
    estimates: dict[str, int]
    warnings: list[Problem]


class Merge(MergeSummary, JobDetails):
    recipe: dict[str, Any]
    resolved: dict[str, Any]
    evaluation: list[Score]


class PointProgress(TypedDict):
    points_done: int
    points_total: int
    fraction: float


class Scoring(JobSummary, JobDetails):
    """What sweeps and evaluations have in common."""

    progress: PointProgress
    tasks: list[dict[str, Any]]


class Evaluation(Scoring):
    model: str
    scores: list[Score]


class SweepPoint(TypedDict):
    number: int
    settings: dict[str, Any]
    scores: list[Score] | None
    kept: dict[str, float | None]
    mean: float | None
    minimum: float | None
    scored_at: str | None


class HeldAgainst(TypedDict):
    name: str
    scores: list[Score] | None


class Sweep(Scoring):
    recipe: dict[str, Any]
    grid: dict[str, list[Any]]
    against: list[HeldAgainst]
    points: list[SweepPoint]
    best: int | None


class MergePage(TypedDict):
    items: list[MergeSummary]
    next_cursor: str | None


class Event(TypedDict):
    id: int
    type: str
    at: str
    data: dict[str, Any]


class EventPage(TypedDict):
    items: list[Event]
    after: int


class File(TypedDict):
    name: str
    size: int
    sha256: str
    url: str


class FileList(TypedDict):
    items: list[File]
    size: int
    manifest_sha256: str


class PlannedSource(TypedDict):
    reference: str
    role: str
    size: int
    files: list[str]


class EarlierMerge(TypedDict):
    name: str
    method: str
    base: PlannedSource
    sources: list[PlannedSource]
    estimates: dict[str, int]


class Plan(TypedDict):
    method: str
    fingerprint: str
    earlier: list[EarlierMerge]
    base: PlannedSource
    sources: list[PlannedSource]
    touched: list[dict[str, Any]]
    shards: list[dict[str, Any]]
    estimates: dict[str, int]
    warnings: list[Problem]
    recipe: dict[str, Any]


class Source(TypedDict):
    reference: str
    kind: str
    size: int
    detail: str


class SourceList(TypedDict):
    items: list[Source]


class Waiting(TypedDict):
    jobs: int
    oldest_seconds: float


class Queue(TypedDict):
    name: str
    waiting: int
    oldest_seconds: float
    by_priority: dict[str, Waiting]
    running: int
    workers: list[str]


class QueueList(TypedDict):
    items: list[Queue]


class Worker(TypedDict):
    name: str
    host: str
    process: int
    device: str | None
    queues: list[str]
    state: str
    job: str | None
    version: str
    started_at: str
    seen_at: str


class WorkerList(TypedDict):
    items: list[Worker]


class UploadedFile(TypedDict):
    name: str
    size: int
    sha256: str


class Upload(TypedDict):
    reference: str
    kind: str
    files: list[UploadedFile]


class AliasSummary(TypedDict):
    """``repo`` is what hub clients call it, ``commit`` its revision now."""

    name: str
    owner: str
    repo: str
    merge: str
    commit: str
    created_at: str
    moved_at: str


class Move(TypedDict):
    merge: str
    commit: str
    at: str
    key_id: str | None


class Alias(AliasSummary):
    history: list[Move]


class AliasList(TypedDict):
    items: list[AliasSummary]
