"""The client for event loops (asyncio, trio): the calls of ``Client``, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import anyio
import anyio.to_thread
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
from mergeyard.client import Client, address, headers
from mergeyard.download import Download, OnProgress

T = TypeVar("T")


class AsyncClient:
    """As ``Client``. What reads or writes files (``upload``, ``download``) does so in a thread of its own."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = address(url)
        self._retries = retries
        self._calls = Calls(self.url, retries)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers(api_key), timeout=timeout, transport=transport
        )
        both = transport if isinstance(transport, httpx.BaseTransport) else None
        self._in_threads = Client(self.url, api_key, timeout=timeout, retries=retries, transport=both)

    async def aclose(self) -> None:
        self._in_threads.close()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def submit(
        self, recipe: Mapping[str, Any] | str, *, idempotency_key: str | None = None, **envelope: Any
    ) -> Merge:
        """As ``Client.submit``."""
        return await self._run(self._calls.submit(recipe, idempotency_key, envelope))

    async def plan(self, recipe: Mapping[str, Any] | str) -> Plan:
        """As ``Client.plan``."""
        return await self._run(self._calls.plan(recipe))

    async def get(self, merge_id: str) -> Merge:
        """As ``Client.get``."""
        return await self._run(self._calls.get(merge_id))

    def list(
        self, *, status: str | Sequence[str] | None = None, method: str | None = None, page_size: int = 100
    ) -> AsyncIterator[MergeSummary]:
        """As ``Client.list``."""
        return self._items(Call(self._calls.list(status, method, page_size)))

    async def page(
        self,
        *,
        status: str | Sequence[str] | None = None,
        method: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> MergePage:
        """As ``Client.page``."""
        return await self._run(self._calls.page(status, method, limit, cursor))

    def events(
        self, merge_id: str, *, after: int = 0, on_progress: Callable[[Progress], None] | None = None
    ) -> AsyncIterator[Event]:
        """As ``Client.events``."""
        return self._items(Call(self._calls.events(merge_id, after, on_progress)))

    async def event_page(self, merge_id: str, *, after: int = 0, limit: int = 200) -> EventPage:
        """As ``Client.event_page``."""
        return await self._run(self._calls.event_page(merge_id, after, limit))

    async def wait(
        self, merge_id: str, on_update: Callable[[Merge], None] | None = None, timeout: float | None = None
    ) -> Merge:
        """As ``Client.wait``."""
        found: Merge = await self._run(self._calls.wait(merge_id, on_update, timeout))
        return found

    async def cancel(self, merge_id: str) -> Merge:
        """As ``Client.cancel``."""
        found: Merge = await self._run(self._calls.cancel(merge_id))
        return found

    async def delete(self, merge_id: str) -> None:
        """As ``Client.delete``."""
        await self._run(self._calls.delete(merge_id))

    async def files(self, merge_id: str) -> FileList:
        """As ``Client.files``."""
        return await self._run(self._calls.files(merge_id))

    async def download(
        self, merge_id: str, directory: Path | str, on_progress: OnProgress | None = None, *, at_once: int = 4
    ) -> Path:
        """As ``Client.download``; ``on_progress`` is called by another thread. Cancelled, it stops."""
        listing = await self.files(merge_id)
        download = Download(self._in_threads._http, listing, Path(directory), self._retries, on_progress)
        try:
            await anyio.to_thread.run_sync(partial(download.run, at_once), abandon_on_cancel=True)
        finally:
            download.stop()
        return Path(directory)

    async def upload(self, paths: Sequence[Path | str]) -> Upload:
        """As ``Client.upload``."""
        return await anyio.to_thread.run_sync(self._in_threads.upload, paths, abandon_on_cancel=True)

    async def sources(self) -> SourceList:
        """As ``Client.sources``."""
        return await self._run(self._calls.sources())

    async def queues(self) -> QueueList:
        """As ``Client.queues``."""
        return await self._run(self._calls.queues())

    async def workers(self) -> WorkerList:
        """As ``Client.workers``."""
        return await self._run(self._calls.workers())

    async def aliases(self) -> AliasList:
        """As ``Client.aliases``."""
        return await self._run(self._calls.aliases())

    async def alias(self, name: str) -> Alias:
        """As ``Client.alias``."""
        return await self._run(self._calls.alias(name))

    async def point_alias(self, name: str, merge_id: str) -> AliasSummary:
        """As ``Client.point_alias``."""
        return await self._run(self._calls.point_alias(name, merge_id))

    async def delete_alias(self, name: str) -> None:
        """As ``Client.delete_alias``."""
        await self._run(self._calls.delete_alias(name))

    # ── sweeps and evaluations ───────────────────────────────────────────────────────────────────

    async def submit_sweep(
        self,
        recipe: Mapping[str, Any] | str,
        grid: Mapping[str, Sequence[Any]],
        tasks: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        **envelope: Any,
    ) -> Sweep:
        """As ``Client.submit_sweep``."""
        return await self._run(self._calls.submit_sweep(recipe, grid, tasks, idempotency_key, envelope))

    async def sweep(
        self,
        recipe: Mapping[str, Any] | str,
        grid: Mapping[str, Sequence[Any]],
        tasks: Sequence[Mapping[str, Any]],
        *,
        on_update: Callable[[Sweep], None] | None = None,
        timeout: float | None = None,
        **envelope: Any,
    ) -> Sweep:
        """As ``Client.sweep``."""
        made = await self.submit_sweep(recipe, grid, tasks, **envelope)
        return await self.wait_sweep(made["id"], on_update, timeout)

    async def get_sweep(self, sweep_id: str) -> Sweep:
        """As ``Client.get_sweep``."""
        found: Sweep = await self._run(self._calls.scoring(sweep_id))
        return found

    async def wait_sweep(
        self, sweep_id: str, on_update: Callable[[Sweep], None] | None = None, timeout: float | None = None
    ) -> Sweep:
        """As ``Client.wait_sweep``."""
        found: Sweep = await self._run(self._calls.wait(sweep_id, on_update, timeout))
        return found

    async def cancel_sweep(self, sweep_id: str) -> Sweep:
        """As ``Client.cancel_sweep``."""
        found: Sweep = await self._run(self._calls.cancel(sweep_id))
        return found

    async def merge_point(
        self, sweep_id: str, point: int | None = None, *, idempotency_key: str | None = None, **envelope: Any
    ) -> Merge:
        """As ``Client.merge_point``."""
        return await self._run(self._calls.merge_point(sweep_id, point, idempotency_key, envelope))

    async def submit_evaluation(
        self,
        model: str,
        tasks: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        **envelope: Any,
    ) -> Evaluation:
        """As ``Client.submit_evaluation``."""
        return await self._run(self._calls.submit_evaluation(model, tasks, idempotency_key, envelope))

    async def get_evaluation(self, evaluation_id: str) -> Evaluation:
        """As ``Client.get_evaluation``."""
        found: Evaluation = await self._run(self._calls.scoring(evaluation_id))
        return found

    async def wait_evaluation(
        self, evaluation_id: str, on_update: Callable[[Evaluation], None] | None = None, timeout: float | None = None
    ) -> Evaluation:
        """As ``Client.wait_evaluation``."""
        found: Evaluation = await self._run(self._calls.wait(evaluation_id, on_update, timeout))
        return found

    async def cancel_evaluation(self, evaluation_id: str) -> Evaluation:
        """As ``Client.cancel_evaluation``."""
        found: Evaluation = await self._run(self._calls.cancel(evaluation_id))
        return found

    # ── taking steps ─────────────────────────────────────────────────────────────────────────────

    async def _run(self, steps: Steps[T]) -> T:
        call = Call(steps)
        async for _ in self._items(call):
            pass
        return call.result

    async def _items(self, call: Call[Any]) -> AsyncIterator[Any]:
        """Take every step; what is emitted, in order."""
        async with AsyncExitStack() as stream:
            while (step := call.step) is not None:
                answer: object = None
                try:
                    match step:
                        case Emit(item):
                            yield item
                        case Sleep(seconds):
                            await anyio.sleep(seconds)
                        case Send():
                            answer = await self._http.request(step.method, step.path, **step.options)
                        case Open(path, asked):
                            await stream.aclose()
                            opened = self._http.stream("GET", path, headers=asked, timeout=SILENCE_SECONDS)
                            answer = response = await stream.enter_async_context(opened)
                            lines = response.aiter_lines()
                        case NextLine():
                            answer = await anext(lines, None)
                        case ReadAll():
                            await response.aread()
                except (httpx.TransportError, httpx.InvalidURL) as error:
                    call.fail(error)
                else:
                    call.answer(answer)
