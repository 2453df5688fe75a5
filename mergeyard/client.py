"""The client: a merge over HTTP, from a recipe to files that are known to be right. Needs httpx and nothing else.

with Client("http://127.0.0.1:8000") as client:
    merge = client.wait(client.submit(recipe)["id"])
    client.download(merge["id"], Path("merged"))
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx

from mergeyard.answers import (
    ApiError,
    Event,
    EventPage,
    FileList,
    Merge,
    MergePage,
    Plan,
    Progress,
    QueueList,
    SourceList,
    Upload,
    WorkerList,
    read_error,
)
from mergeyard.download import LONGEST_PAUSE, OnProgress, fetch_all
from mergeyard.messages import EVENT_STREAM, read_messages

FINISHED = frozenset({"succeeded", "failed", "cancelled"})
RETRIED_STATUSES = frozenset({429, 502, 503, 504})
MAX_POLL_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # an event stream sends something every 15 s


class Client:
    """The service at ``url``. Every method raises ApiError, also where the service cannot be reached.

    ``api_key`` None takes MERGEYARD_API_KEY from the environment; an empty one sends none.

    What is safe to repeat is repeated (``retries`` times, waiting 0.25 s, 0.5 s, 1 s, … between) when the connection
    breaks or the service is not ready; a submission is made safe by an Idempotency-Key of its own.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Accept": "application/json", "User-Agent": "mergeyard"}
        if api_key is None:
            api_key = os.environ.get("MERGEYARD_API_KEY", "")
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.url = url.rstrip("/")
        self._retries = retries
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, recipe: Mapping[str, Any] | str, *, idempotency_key: str | None = None, **envelope: Any) -> Merge:
        """Queue a merge. ``recipe`` is a mapping or YAML text; ``envelope``: queue, priority, labels, webhook,
        expires_in (seconds), pinned, force (merge again even where there is an equal result).

        The same ``idempotency_key`` with the same arguments gives the same merge; without one, each call is a new one.
        """
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        body = {"recipe": recipe, **envelope}
        return self._json("POST", "/merges", json=body, headers=headers)  # type: ignore[no-any-return]

    def plan(self, recipe: Mapping[str, Any] | str) -> Plan:
        """What a merge would do, or every problem it has."""
        return self._json("POST", "/merges/plan", json={"recipe": recipe})  # type: ignore[no-any-return]

    def get(self, merge_id: str) -> Merge:
        """The merge as it is now."""
        return self._json("GET", f"/merges/{merge_id}")  # type: ignore[no-any-return]

    def list(
        self,
        *,
        status: str | Sequence[str] | None = None,
        method: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> MergePage:
        """One page of merges, newest first; pass its ``next_cursor`` as ``cursor`` for the next one."""
        given = {"status": status, "method": method, "limit": limit, "cursor": cursor}
        params = {key: value for key, value in given.items() if value is not None}
        return self._json("GET", "/merges", params=params)  # type: ignore[no-any-return]

    def events(self, merge_id: str, *, after: int = 0, limit: int = 200) -> EventPage:
        """What happened to the merge after event ``after``, in order."""
        params = {"after": after, "limit": limit}
        return self._json("GET", f"/merges/{merge_id}/events", params=params)  # type: ignore[no-any-return]

    def follow(
        self, merge_id: str, *, after: int = 0, on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[Event]:
        """What happened to the merge after event ``after``, and what happens from then on, until it has finished.

        A stream that breaks is taken up again where it ended; ApiError where that fails ``retries`` times in a row.
        """
        pauses = _pauses(self._retries)
        while True:
            problem: ApiError | None = None
            headers = {"Accept": EVENT_STREAM, "Last-Event-ID": str(after)}
            try:
                with self._http.stream(
                    "GET", f"/merges/{merge_id}/events", headers=headers, timeout=SILENCE_SECONDS
                ) as response:
                    if response.status_code == 204:  # it has finished, and nothing is new
                        return
                    if response.headers.get("content-type", "").partition(";")[0] != EVENT_STREAM:
                        response.read()
                        raise read_error(response)
                    for message in read_messages(response.iter_lines()):
                        pauses = _pauses(self._retries)
                        if message.event == "progress":
                            if on_progress is not None:
                                on_progress(message.data)
                            continue
                        event: Event = message.data
                        after = event["id"]
                        yield event
                        if event["type"] in FINISHED:
                            return
            except httpx.TransportError as error:
                problem = _unreachable(self.url, error)
            except ApiError as error:
                if error.status not in RETRIED_STATUSES:
                    raise
                problem = error
            pause = next(pauses, None)
            if pause is None:
                raise problem or ApiError("unexpected_response", 200, f"{self.url} ends its event streams at once.")
            time.sleep(pause)

    def cancel(self, merge_id: str) -> Merge:
        """Ask the merge to stop. Its status is then cancelled, or cancelling until its worker has let go."""
        return self._json("POST", f"/merges/{merge_id}/cancel")  # type: ignore[no-any-return]

    def delete(self, merge_id: str) -> None:
        """Delete a finished merge and its files."""
        try:
            self._send("DELETE", f"/merges/{merge_id}")
        except ApiError as error:
            if not (error.code == "not_found" and error.repeated):  # the first try got through
                raise

    def files(self, merge_id: str) -> FileList:
        """The files of a succeeded merge, with sizes and digests."""
        return self._json("GET", f"/merges/{merge_id}/files")  # type: ignore[no-any-return]

    def sources(self) -> SourceList:
        """What recipes may name."""
        return self._json("GET", "/sources")  # type: ignore[no-any-return]

    def queues(self) -> QueueList:
        """What waits and runs, and who serves it."""
        return self._json("GET", "/queues")  # type: ignore[no-any-return]

    def workers(self) -> WorkerList:
        """Who works, and on what."""
        return self._json("GET", "/workers")  # type: ignore[no-any-return]

    def upload(self, paths: Sequence[Path | str]) -> Upload:
        """Send the files of one model or adapter; a folder stands for the files in it."""
        files = [file for path in paths for file in _files_of(Path(path))]
        with ExitStack() as opened:
            parts = [("files", (file.name, opened.enter_context(file.open("rb")))) for file in files]
            # Not repeated: httpx would send the rest of a file that was already read in part.
            response = self._send("POST", "/uploads", repeat=False, files=parts, timeout=None)
        return response.json()  # type: ignore[no-any-return]

    def wait(
        self,
        merge_id: str,
        on_update: Callable[[Merge], None] | None = None,
        timeout: float | None = None,
    ) -> Merge:
        """Poll until the merge has finished, and return it whatever its end. ``on_update`` is told of every change.

        Waits as the service asks (Retry-After), and longer while nothing changes. TimeoutError after ``timeout``
        seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        etag, merge, pause = "", None, 0.0
        while True:
            headers = {"If-None-Match": etag} if etag else {}
            response = self._send("GET", f"/merges/{merge_id}", headers=headers)
            if response.status_code != 304:
                etag, pause = response.headers.get("etag", ""), 0.0
                merge = response.json()
                if on_update is not None:
                    on_update(merge)
                if merge["status"] in FINISHED:
                    return merge  # type: ignore[no-any-return]
            pause = max(_retry_after(response, default=1.0), min(MAX_POLL_SECONDS, pause * 1.5))
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"{merge_id} has not finished after {timeout} seconds")
            time.sleep(pause)

    def download(self, merge_id: str, directory: Path | str, on_progress: OnProgress | None = None) -> Path:
        """Fetch every file of a merge into ``directory`` and verify it; returns the directory.

        What an earlier call left unfinished (``NAME.part``) is continued, what is there and right is kept. See
        ``download.fetch_all`` for what is refused.
        """
        listing = self.files(merge_id)
        fetch_all(self._http, listing, Path(directory), self._retries, on_progress)
        return Path(directory)

    def _json(self, method: str, path: str, **options: Any) -> Any:
        return self._send(method, path, **options).json()

    def _send(self, method: str, path: str, *, repeat: bool = True, **options: Any) -> httpx.Response:
        tries = 1 + (self._retries if repeat else 0)
        for attempt, pause in enumerate(_pauses(tries)):
            last = attempt == tries - 1
            try:
                response = self._http.request(method, path, **options)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol):
                message = f"{self.url!r} is not the URL of a service; it looks like http://127.0.0.1:8000."
                raise ApiError("request_invalid", 0, message, fault="user") from None
            except httpx.TransportError as error:
                if last:
                    raise _unreachable(self.url, error) from None
            else:
                if response.is_success or response.status_code == 304:
                    return response
                if last or response.status_code not in RETRIED_STATUSES:
                    raise read_error(response, repeated=attempt > 0)
                pause = min(_retry_after(response, default=pause), LONGEST_PAUSE)  # noqa: PLW2901
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _pauses(tries: int) -> Iterator[float]:
    for attempt in range(tries):
        yield 0.25 * 2**attempt


def _retry_after(response: httpx.Response, default: float) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else default


def _unreachable(url: str, error: httpx.TransportError) -> ApiError:
    what = str(error) or type(error).__name__
    return ApiError("unreachable", 0, f"{url} cannot be reached ({what}); is `mergeyard up` running there?")


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
