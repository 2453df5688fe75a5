"""The client: a merge over HTTP, from a recipe to files that are known to be right. Needs httpx and nothing else.

with Client("http://127.0.0.1:8000") as client:
    merge = client.wait(client.submit(recipe)["id"])
    client.download(merge["id"], Path("merged"))
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

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
    MergeSummary,
    Plan,
    Progress,
    QueueList,
    SourceList,
    Sweep,
    Upload,
    WorkerList,
)
from mergeyard.calls import SILENCE_SECONDS, Call, Calls, Emit, NextLine, Open, ReadAll, Send, Sleep, Steps
from mergeyard.download import Download, OnProgress

LOCAL = "http://127.0.0.1:8000"

T = TypeVar("T")


class Client:
    """The service at ``url``. Every method raises ApiError (``mergeyard.errors`` has its kinds), also where the service
    cannot be reached. May be shared between threads.

    ``url`` None takes MERGEYARD_URL from the environment, or this machine; ``api_key`` None takes MERGEYARD_API_KEY, an
    empty one sends none.

    What is safe to repeat is repeated (``retries`` times, after about 0.25 s, 0.5 s, 1 s, … or as long as Retry-After
    says) when the connection breaks or the service is not ready; a submission is made safe by an Idempotency-Key.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = address(url)
        self._retries = retries
        self._calls = Calls(self.url, retries)
        self._http = httpx.Client(base_url=self.url, headers=headers(api_key), timeout=timeout, transport=transport)

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
        return self._run(self._calls.submit(recipe, idempotency_key, envelope))

    def plan(self, recipe: Mapping[str, Any] | str) -> Plan:
        """What a merge would do; InvalidRequestError with every problem it has."""
        return self._run(self._calls.plan(recipe))

    def get(self, merge_id: str) -> Merge:
        """The merge as it is now."""
        return self._run(self._calls.get(merge_id))

    def list(
        self, *, status: str | Sequence[str] | None = None, method: str | None = None, page_size: int = 100
    ) -> Iterator[MergeSummary]:
        """Every merge, newest first; pages are fetched as they are needed."""
        return self._iterate(self._calls.list(status, method, page_size))

    def page(
        self,
        *,
        status: str | Sequence[str] | None = None,
        method: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> MergePage:
        """One page of them; pass its ``next_cursor`` as ``cursor`` for the next one."""
        return self._run(self._calls.page(status, method, limit, cursor))

    def events(
        self, merge_id: str, *, after: int = 0, on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[Event]:
        """What happened to the merge (or, by its id, the sweep or evaluation) after event ``after``, and what happens
        from then on, until it has finished.

        A stream that breaks is taken up where it ended; ApiError where that fails ``retries`` times in a row.
        """
        return self._iterate(self._calls.events(merge_id, after, on_progress))

    def event_page(self, merge_id: str, *, after: int = 0, limit: int = 200) -> EventPage:
        """What has happened to the merge after event ``after``, without waiting for more."""
        return self._run(self._calls.event_page(merge_id, after, limit))

    def wait(
        self, merge_id: str, on_update: Callable[[Merge], None] | None = None, timeout: float | None = None
    ) -> Merge:
        """Wait until the merge has finished, and return it whatever its end. ``on_update`` is told of every change.

        TimeoutError after ``timeout`` seconds.
        """
        found: Merge = self._run(self._calls.wait(merge_id, on_update, timeout))
        return found

    def cancel(self, merge_id: str) -> Merge:
        """Ask the merge to stop. Its status is then cancelled, or cancelling until its worker has let go."""
        found: Merge = self._run(self._calls.cancel(merge_id))
        return found

    def delete(self, merge_id: str) -> None:
        """Delete a finished merge and its files; or by its id a sweep or an evaluation."""
        self._run(self._calls.delete(merge_id))

    def files(self, merge_id: str) -> FileList:
        """The files of a succeeded merge, with sizes and digests."""
        return self._run(self._calls.files(merge_id))

    def download(
        self, merge_id: str, directory: Path | str, on_progress: OnProgress | None = None, *, at_once: int = 4
    ) -> Path:
        """Fetch every file of a merge into ``directory``, ``at_once`` of them, and verify each; the directory.

        What an earlier call left unfinished (``NAME.part``) is continued, what is there and right is kept.
        DownloadError for what is refused; see ``download.Download``.
        """
        listing = self.files(merge_id)
        Download(self._http, listing, Path(directory), self._retries, on_progress).run(at_once)
        return Path(directory)

    def upload(self, paths: Sequence[Path | str]) -> Upload:
        """Send the files of one model or adapter (a folder: the files in it). Recipes name it by its ``reference``."""
        return self._run(self._calls.upload(paths))

    def sources(self) -> SourceList:
        """What recipes may name."""
        return self._run(self._calls.sources())

    def queues(self) -> QueueList:
        """What waits and runs, and who serves it."""
        return self._run(self._calls.queues())

    def workers(self) -> WorkerList:
        """Who works, and on what."""
        return self._run(self._calls.workers())

    def aliases(self) -> AliasList:
        """Your aliases, by name."""
        return self._run(self._calls.aliases())

    def alias(self, name: str) -> Alias:
        """What an alias points to, and has pointed to."""
        return self._run(self._calls.alias(name))

    def point_alias(self, name: str, merge_id: str) -> AliasSummary:
        """Make the alias, or move it in one step, to a succeeded merge."""
        return self._run(self._calls.point_alias(name, merge_id))

    def delete_alias(self, name: str) -> None:
        """Its name and history go; the merges stay."""
        self._run(self._calls.delete_alias(name))

    # ── sweeps and evaluations ───────────────────────────────────────────────────────────────────

    def submit_sweep(
        self,
        recipe: Mapping[str, Any] | str,
        grid: Mapping[str, Sequence[Any]],
        tasks: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        **envelope: Any,
    ) -> Sweep:
        """Queue a sweep of ``recipe`` over ``grid``: by parameter its values. ``tasks``: each with ``file``, and
        perhaps ``metric``, ``limit`` and ``source``, the number of the model it belongs to. ``envelope`` as in
        ``submit``.
        """
        return self._run(self._calls.submit_sweep(recipe, grid, tasks, idempotency_key, envelope))

    def sweep(
        self,
        recipe: Mapping[str, Any] | str,
        grid: Mapping[str, Sequence[Any]],
        tasks: Sequence[Mapping[str, Any]],
        *,
        on_update: Callable[[Sweep], None] | None = None,
        timeout: float | None = None,
        **envelope: Any,
    ) -> Sweep:
        """``submit_sweep``, then ``wait_sweep``: every point with its scores, and ``best``."""
        made = self.submit_sweep(recipe, grid, tasks, **envelope)
        return self.wait_sweep(made["id"], on_update, timeout)

    def get_sweep(self, sweep_id: str) -> Sweep:
        """The sweep as it is now."""
        found: Sweep = self._run(self._calls.scoring(sweep_id))
        return found

    def wait_sweep(
        self, sweep_id: str, on_update: Callable[[Sweep], None] | None = None, timeout: float | None = None
    ) -> Sweep:
        """As ``wait``, for a sweep."""
        found: Sweep = self._run(self._calls.wait(sweep_id, on_update, timeout))
        return found

    def cancel_sweep(self, sweep_id: str) -> Sweep:
        """As ``cancel``, for a sweep; what is scored by then stays."""
        found: Sweep = self._run(self._calls.cancel(sweep_id))
        return found

    def merge_point(
        self, sweep_id: str, point: int | None = None, *, idempotency_key: str | None = None, **envelope: Any
    ) -> Merge:
        """Queue the merge of a sweep's point, by its number, or of the best one. ``envelope`` as in ``submit``."""
        return self._run(self._calls.merge_point(sweep_id, point, idempotency_key, envelope))

    def submit_evaluation(
        self,
        model: str,
        tasks: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        **envelope: Any,
    ) -> Evaluation:
        """Queue the scoring of a model as it is; ``MODEL+ADAPTER`` is their merge. ``tasks`` as in ``submit_sweep``."""
        return self._run(self._calls.submit_evaluation(model, tasks, idempotency_key, envelope))

    def get_evaluation(self, evaluation_id: str) -> Evaluation:
        """The evaluation as it is now."""
        found: Evaluation = self._run(self._calls.scoring(evaluation_id))
        return found

    def wait_evaluation(
        self, evaluation_id: str, on_update: Callable[[Evaluation], None] | None = None, timeout: float | None = None
    ) -> Evaluation:
        """As ``wait``, for an evaluation."""
        found: Evaluation = self._run(self._calls.wait(evaluation_id, on_update, timeout))
        return found

    def cancel_evaluation(self, evaluation_id: str) -> Evaluation:
        """As ``cancel``, for an evaluation."""
        found: Evaluation = self._run(self._calls.cancel(evaluation_id))
        return found

    # ── taking steps ─────────────────────────────────────────────────────────────────────────────

    def _run(self, steps: Steps[T]) -> T:
        call = Call(steps)
        for _ in self._items(call):
            pass
        return call.result

    def _iterate(self, steps: Steps[None]) -> Iterator[Any]:
        yield from self._items(Call(steps))

    def _items(self, call: Call[Any]) -> Iterator[Any]:
        """Take every step; what is emitted, in order."""
        lines: Iterator[str] = iter(())
        with ExitStack() as stream:
            while (step := call.step) is not None:
                answer: object = None
                try:
                    match step:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            time.sleep(seconds)
                        case Send():
                            answer = self._send(step)
                        case Open(path, asked):
                            stream.close()
                            opened = self._http.stream("GET", path, headers=asked, timeout=SILENCE_SECONDS)
                            answer = response = stream.enter_context(opened)
                            lines = response.iter_lines()
                        case NextLine():
                            answer = next(lines, None)
                        case ReadAll():
                            response.read()
                except (httpx.TransportError, httpx.InvalidURL) as error:
                    call.fail(error)
                else:
                    call.answer(answer)

    def _send(self, step: Send) -> httpx.Response:
        with ExitStack() as opened:
            parts = [("files", (file.name, opened.enter_context(file.open("rb")))) for file in step.files]
            options = {**step.options, "files": parts} if parts else step.options
            return self._http.request(step.method, step.path, **options)


def address(url: str | None) -> str:
    """Of the service: as given, or as the environment has it."""
    return (os.environ.get("MERGEYARD_URL", LOCAL) if url is None else url).rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """What every request has."""
    key = os.environ.get("MERGEYARD_API_KEY", "") if api_key is None else api_key
    return {
        "Accept": "application/json",
        "User-Agent": "mergeyard",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }
