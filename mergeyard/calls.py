"""What the client does, without doing it: each call is a generator of steps, which a client takes and answers.

So there is one place for every request, retry and resumption, and none of it knows whether it runs in a thread or in
an event loop. Whoever takes the steps (``Client``, ``AsyncClient``) answers each: a Send with its response, an Open
with the opened stream, a NextLine with a line or None; what httpx raises is raised here.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import httpx

from mergeyard.answers import (
    Alias,
    AliasList,
    AliasSummary,
    Evaluation,
    Event,
    EventPage,
    FileList,
    Merge,
    MergePage,
    Plan,
    Progress,
    QueueList,
    SourceList,
    Sweep,
    Upload,
    WorkerList,
)
from mergeyard.errors import ApiError, InvalidRequestError, UnavailableError, read_error
from mergeyard.messages import EVENT_STREAM, MessageReader

FINISHED = frozenset({"succeeded", "failed", "cancelled"})
RETRIED_STATUSES = frozenset({429, 502, 503, 504})
POLL_SECONDS = 1.0
MAX_POLL_SECONDS = 5.0
LONGEST_PAUSE = 60.0  # a rate limit counts minutes
PLANNING_SECONDS = 300.0  # every point of a grid is planned before a sweep is accepted
SILENCE_SECONDS = 60.0  # an event stream sends something every 15 s

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """A request; ``options`` are httpx's. ``files`` are opened anew for every try."""

    method: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """A request whose answer is read line by line. It ends the stream before it."""

    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NextLine:
    """Of the open stream; None at its end."""


@dataclass(frozen=True, slots=True)
class ReadAll:
    """The rest of the open stream, into its response."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Something for whoever iterates."""

    item: Any


Step: TypeAlias = Send | Sleep | Open | NextLine | ReadAll | Emit
Steps: TypeAlias = Generator[Step, Any, T]


class Call(Generic[T]):
    """A call under way. ``step`` is what is to be done now; None once there is a ``result``."""

    result: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.step: Step | None = None
        self.answer(None)

    def answer(self, value: object) -> None:
        """What the step gave."""
        self._go_on(lambda: self._steps.send(value))

    def fail(self, error: Exception) -> None:
        """What it raised instead."""
        self._go_on(lambda: self._steps.throw(error))

    def _go_on(self, advance: Callable[[], Step]) -> None:
        try:
            self.step = advance()
        except StopIteration as done:
            self.step, self.result = None, done.value


class Calls:
    """The calls to the service at ``url``. What is safe to repeat is repeated ``retries`` times."""

    def __init__(self, url: str, retries: int) -> None:
        self.url, self._retries = url, retries

    # ── merges ───────────────────────────────────────────────────────────────────────────────────

    def submit(
        self, recipe: Mapping[str, Any] | str, idempotency_key: str | None, envelope: Mapping[str, Any]
    ) -> Steps[Merge]:
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return self._json("POST", "/merges", json={"recipe": recipe, **envelope}, headers=headers)

    def plan(self, recipe: Mapping[str, Any] | str) -> Steps[Plan]:
        return self._json("POST", "/merges/plan", json={"recipe": recipe})

    def get(self, merge_id: str) -> Steps[Merge]:
        return self._json("GET", f"/merges/{merge_id}")

    def page(
        self, status: str | Sequence[str] | None, method: str | None, limit: int, cursor: str | None
    ) -> Steps[MergePage]:
        given = {"status": status, "method": method, "limit": limit, "cursor": cursor}
        return self._json("GET", "/merges", params={key: value for key, value in given.items() if value is not None})

    def list(self, status: str | Sequence[str] | None, method: str | None, page_size: int) -> Steps[None]:
        """Emits MergeSummary after MergeSummary, over all pages."""
        cursor: str | None = None
        while True:
            page = yield from self.page(status, method, page_size, cursor)
            for merge in page["items"]:
                yield Emit(merge)
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def event_page(self, job_id: str, after: int, limit: int) -> Steps[EventPage]:
        return self._json("GET", f"{path_of(job_id)}/events", params={"after": after, "limit": limit})

    def events(self, job_id: str, after: int, on_progress: Callable[[Progress], None] | None) -> Steps[None]:
        """Emits Event after Event until the job has finished. A stream that breaks is taken up where it ended."""
        failures = 0
        while True:
            problem: ApiError | None = None
            headers = {"Accept": EVENT_STREAM, "Last-Event-ID": str(after)}
            try:
                response: httpx.Response = yield Open(f"{path_of(job_id)}/events", headers)
                if response.status_code == 204:  # it has finished, and nothing is new
                    return
                if response.headers.get("content-type", "").partition(";")[0] != EVENT_STREAM:
                    yield ReadAll()
                    raise read_error(response)
                reader = MessageReader()
                while (line := (yield NextLine())) is not None:
                    if (message := reader.read(line)) is None:
                        continue
                    failures = 0
                    if message.event == "progress":
                        if on_progress is not None:
                            on_progress(message.data)
                        continue
                    event: Event = message.data
                    after = event["id"]
                    yield Emit(event)
                    if event["type"] in FINISHED:
                        return
            except httpx.TransportError as error:
                problem = unreachable(self.url, error)
            except ApiError as error:
                if error.status not in RETRIED_STATUSES:
                    raise
                problem = error
            failures += 1
            if failures > self._retries:
                raise problem or ApiError("unexpected_response", 200, f"{self.url} ends its event streams at once.")
            yield Sleep(pause_before(failures))

    def wait(self, job_id: str, on_update: Callable[[Any], None] | None, timeout: float | None) -> Steps[Any]:
        """Polls as the service asks (Retry-After), and more slowly while nothing changes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        etag, pause = "", 0.0
        while True:
            headers = {"If-None-Match": etag} if etag else {}
            response = yield from self._send("GET", path_of(job_id), headers=headers)
            if response.status_code != 304:
                etag, pause = response.headers.get("etag", ""), 0.0
                job = response.json()
                if on_update is not None:
                    on_update(job)
                if job["status"] in FINISHED:
                    return job
            asked = retry_after(response)
            pause = max(POLL_SECONDS if asked is None else asked, min(MAX_POLL_SECONDS, pause * 1.5))
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"{job_id} has not finished after {timeout} seconds")
            yield Sleep(pause)

    def cancel(self, job_id: str) -> Steps[Any]:
        return self._json("POST", f"{path_of(job_id)}/cancel")

    def delete(self, job_id: str) -> Steps[None]:
        return self._delete(path_of(job_id))

    def files(self, merge_id: str) -> Steps[FileList]:
        return self._json("GET", f"/merges/{merge_id}/files")

    # ── sweeps and evaluations ───────────────────────────────────────────────────────────────────

    def submit_sweep(
        self,
        recipe: Mapping[str, Any] | str,
        grid: Mapping[str, Sequence[Any]],
        tasks: Sequence[Mapping[str, Any]],
        idempotency_key: str | None,
        envelope: Mapping[str, Any],
    ) -> Steps[Sweep]:
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        body = {"recipe": recipe, "grid": grid, "tasks": tasks, **envelope}
        return self._json("POST", "/sweeps", json=body, headers=headers, timeout=PLANNING_SECONDS)

    def submit_evaluation(
        self,
        model: str,
        tasks: Sequence[Mapping[str, Any]],
        idempotency_key: str | None,
        envelope: Mapping[str, Any],
    ) -> Steps[Evaluation]:
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        return self._json("POST", "/evaluations", json={"model": model, "tasks": tasks, **envelope}, headers=headers)

    def scoring(self, job_id: str) -> Steps[Any]:
        return self._json("GET", path_of(job_id))

    def merge_point(
        self, sweep_id: str, point: int | None, idempotency_key: str | None, envelope: Mapping[str, Any]
    ) -> Steps[Merge]:
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        body = {**envelope} if point is None else {"point": point, **envelope}
        return self._json("POST", f"/sweeps/{sweep_id}/merges", json=body, headers=headers)

    # ── what there is besides ────────────────────────────────────────────────────────────────────

    def sources(self) -> Steps[SourceList]:
        return self._json("GET", "/sources")

    def queues(self) -> Steps[QueueList]:
        return self._json("GET", "/queues")

    def workers(self) -> Steps[WorkerList]:
        return self._json("GET", "/workers")

    def upload(self, paths: Sequence[Path | str]) -> Steps[Upload]:
        """Safe to repeat: the same bytes are the same upload."""
        files = [file for path in paths for file in _files_of(Path(path))]
        return self._json("POST", "/uploads", files=files, timeout=None)

    def aliases(self) -> Steps[AliasList]:
        return self._json("GET", "/aliases")

    def alias(self, name: str) -> Steps[Alias]:
        return self._json("GET", f"/aliases/{name}")

    def point_alias(self, name: str, merge_id: str) -> Steps[AliasSummary]:
        return self._json("PUT", f"/aliases/{name}", json={"merge": merge_id})

    def delete_alias(self, name: str) -> Steps[None]:
        return self._delete(f"/aliases/{name}")

    # ── one request ──────────────────────────────────────────────────────────────────────────────

    def _json(self, method: str, path: str, *, files: Sequence[Path] = (), **options: Any) -> Steps[Any]:
        response = yield from self._send(method, path, files=files, **options)
        return response.json()

    def _delete(self, path: str) -> Steps[None]:
        try:
            yield from self._send("DELETE", path)
        except ApiError as error:
            if not (error.code == "not_found" and error.repeated):  # the first try got through
                raise

    def _send(self, method: str, path: str, *, files: Sequence[Path] = (), **options: Any) -> Steps[httpx.Response]:
        for attempt in range(1, self._retries + 2):
            last = attempt == self._retries + 1
            asked: float | None = None
            try:
                response: httpx.Response = yield Send(method, path, options, files)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol):
                message = f"{self.url!r} is not the URL of a service; it looks like http://127.0.0.1:8000."
                raise InvalidRequestError("request_invalid", 0, message, fault="user") from None
            except httpx.TransportError as error:
                if last:
                    raise unreachable(self.url, error) from None
            else:
                if response.is_success or response.status_code == 304:
                    return response
                if last or response.status_code not in RETRIED_STATUSES:
                    raise read_error(response, repeated=attempt > 1)
                asked = retry_after(response)
            yield Sleep(pause_before(attempt) if asked is None else asked)
        raise AssertionError("the last try returns or raises")


def path_of(job_id: str) -> str:
    """A job's path: its id says what it is."""
    kinds = {"swp": "sweeps", "evl": "evaluations"}
    return f"/{kinds.get(job_id.partition('-')[0], 'merges')}/{job_id}"


def pause_before(attempt: int) -> float:
    """Seconds after the ``attempt``-th failure in a row: 0.25, 0.5, 1, …, less up to a half, so that many clients that
    failed at once do not come back at once.
    """
    return float(min(LONGEST_PAUSE, 0.25 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))  # noqa: S311


def retry_after(response: httpx.Response) -> float | None:
    """Retry-After in seconds, a minute at most, also where a gateway gives a date; None where nothing is asked."""
    value = response.headers.get("retry-after", "")
    if value.isdigit():
        return min(float(value), LONGEST_PAUSE)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one that says nothing of its zone
        return None
    return min(max(0.0, seconds), LONGEST_PAUSE)


def unreachable(url: str, error: httpx.TransportError) -> ApiError:
    what = str(error) or type(error).__name__
    return UnavailableError("unreachable", 0, f"{url} cannot be reached ({what}); is `mergeyard up` running there?")


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
