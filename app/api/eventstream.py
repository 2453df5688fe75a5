"""A merge's events as a stream (server-sent events): what happened before, then what happens, until it has ended."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from anyio import CapacityLimiter, create_task_group, current_time, move_on_after, to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.streams import TERMINAL, Listener, Streams, write_event, write_progress
from app.records.following import Standing
from app.records.job import Event

MEDIA_TYPE = "text/event-stream"
PAGE = 200  # events that are read at once
KEEP_ALIVE_SECONDS = 15.0  # proxies cut what is silent for a minute
KEEP_ALIVE = b": still here\n\n"
SEND_SECONDS = 30.0  # a client that takes nothing for so long is gone
LONGEST_SECONDS = 900.0  # then the client comes back, and its key is looked at again
BEGIN = b"retry: 2000\n\n"  # milliseconds until an EventSource comes back

ReadOn = Callable[[int], Sequence[Event]]  # the next PAGE events after a number


def wants_stream(accept: str) -> bool:
    """Whether an Accept header names event streams, and nothing with a higher q."""
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            weights[media_type] = float(quality)
        except ValueError:
            weights[media_type] = 0.0
    wanted = weights.get(MEDIA_TYPE, 0.0)
    return wanted > 0 and wanted == max(weights.values())


class EventStream(Response):
    """Sends ``first``, what was read of the events after ``after``, and goes on from there.

    ``standing`` was read before them. ``read_on`` runs in a thread of ``limiter``'s.
    """

    def __init__(
        self,
        streams: Streams,
        job_id: str,
        *,
        who: str,
        after: int,
        standing: Standing,
        first: Sequence[Event],
        read_on: ReadOn,
        limiter: CapacityLimiter,
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
        super().__init__(media_type=MEDIA_TYPE, headers=headers)
        del self.headers["content-length"]
        self._streams, self._job_id, self._who = streams, job_id, who
        self._after = after  # the client's, until something was read: it may be any number
        self._read_to = 0
        self._standing, self._first = standing, first
        self._read_on, self._limiter = read_on, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 — ASGI
        with self._streams.place(self._who):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with create_task_group() as tasks:

                async def until_gone() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(until_gone)
                client = _Client(send)
                await self._tell(client)
                if client.there:
                    await send({"type": "http.response.body", "body": b""})
                tasks.cancel_scope.cancel()

    async def _tell(self, client: _Client) -> None:
        await client.send(BEGIN + write_progress(self._standing))
        if await self._catch_up(client, self._first):
            return
        listener = Listener(self._after)
        hearing = self._streams.listening(self._job_id, listener, read_to=self._read_to, standing=self._standing)
        with hearing as passed_on:
            if passed_on > self._read_to:
                if await self._catch_up(client, await self._read()):
                    return
                listener.skip_to(self._after)
            await _follow(client, listener)

    async def _catch_up(self, client: _Client, page: Sequence[Event]) -> bool:
        """Send ``page`` and whatever comes after it. Whether that is all there will be."""
        while True:
            if page:
                self._after = self._read_to = page[-1].id
            await client.send(b"".join(map(write_event, page)))
            if not client.there or self._streams.closing or any(event.type in TERMINAL for event in page):
                return True
            if len(page) < PAGE:
                return False
            page = await self._read()

    async def _read(self) -> Sequence[Event]:
        return await to_thread.run_sync(self._read_on, self._after, limiter=self._limiter)


class _Client:
    """Where a stream goes. ``there``: it takes what it is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.there = True

    async def send(self, text: bytes) -> None:
        if text:
            with move_on_after(SEND_SECONDS) as patience:
                await self._send({"type": "http.response.body", "body": text, "more_body": True})
            self.there = not patience.cancelled_caught


async def _follow(client: _Client, listener: Listener) -> None:
    lot = secrets.randbelow(100) / 1000  # so that those who came together do not all come back together
    until = current_time() + LONGEST_SECONDS * (1 - lot)
    while client.there and current_time() < until:
        due, is_last = await listener.take(KEEP_ALIVE_SECONDS)
        await client.send(due if due or is_last else KEEP_ALIVE)
        if is_last:
            return
