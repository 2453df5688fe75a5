"""What the service answers, as the client hands it on: documents with known keys, and one error."""

from __future__ import annotations

from typing import Any, TypedDict

import httpx


class Problem(TypedDict):
    code: str
    message: str
    where: str


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


class MergeSummary(TypedDict):
    """A merge as lists show it. Times are ISO 8601 in UTC."""

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
    progress: Progress
    error: Failure | None
    artifact: ArtifactSummary | None
    reused: bool
    pinned: bool
    expires_at: str | None
    fingerprint: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    updated_at: str
    urls: dict[str, str]


class FailedAttempt(TypedDict):
    attempt: int
    at: str
    code: str
    message: str


class Webhook(TypedDict):
    url: str
    events: list[str]


class Merge(MergeSummary):
    failures: list[FailedAttempt]
    retry_at: str | None
    recipe: dict[str, Any]
    webhook: Webhook | None
    resolved: dict[str, Any]
    estimates: dict[str, int]
    warnings: list[Problem]


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


class ApiError(Exception):
    """A request that failed.

    ``code`` is the service's (docs/api.md), or one of the client's own: ``unreachable``, ``unexpected_response``,
    ``digest_mismatch``, ``output_exists``, ``unsafe_name``. ``status`` is the HTTP status, 0 where there was no
    answer. ``fault`` is ``user`` where another request would help. ``repeated`` tells that it was not the first try.
    """

    def __init__(
        self,
        code: str,
        status: int,
        detail: str,
        where: str = "",
        problems: list[Problem] | None = None,
        *,
        fault: str = "system",
        request_id: str = "",
        repeated: bool = False,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = status
        self.detail = detail
        self.where = where
        self.problems: list[Problem] = problems or [{"code": code, "message": detail, "where": where}]
        self.fault = fault
        self.request_id = request_id
        self.repeated = repeated


def read_error(response: httpx.Response, *, repeated: bool = False) -> ApiError:
    """The error in a response: its problem document, or ``unexpected_response`` (a proxy's page, another service)."""
    request_id = response.headers.get("x-request-id", "")
    try:
        document = response.json()
        return ApiError(
            document["code"],
            response.status_code,
            document["detail"],
            document.get("where", ""),
            document.get("problems"),
            fault=document.get("fault", "system"),
            request_id=request_id,
            repeated=repeated,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        detail = f"{response.request.url} answered {response.status_code}, and not as Mergeyard does; check the URL."
        return ApiError("unexpected_response", response.status_code, detail, request_id=request_id, repeated=repeated)
