"""Bytes of files that the kernel sends: ASGI's extension Zero Copy Send (asgi.readthedocs.io) for uvicorn."""

from __future__ import annotations

from typing import Any, cast

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from app.api.transfer import ZERO_COPY


class ZeroCopyProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with ``http.response.zerocopysend`` for answers that have a Content-Length."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app = cast(Any, self._offering(cast(ASGIApp, self.app)))

    def _offering(self, app: ASGIApp) -> ASGIApp:
        async def offered(scope: Scope, receive: Receive, send: Send) -> None:
            cycle = self.cycle  # this request's: the next one begins when its answer is complete

            async def send_or_let_send(message: Message) -> None:
                if message["type"] == ZERO_COPY:
                    await self._send_file(cycle, message)
                else:
                    await send(message)

            scope.setdefault("extensions", {})[ZERO_COPY] = {}
            await app(scope, receive, send_or_let_send)

        return offered

    async def _send_file(self, cycle: RequestResponseCycle, message: Message) -> None:
        """Raises OSError where the file ends early: its answer can only be cut then."""
        await self.flow.drain()
        count: int = message["count"]
        if cycle.disconnected or self.transport.is_closing():
            return  # as uvicorn does with everything that is sent to nobody
        # h11 only counts: it gives back what it was told to frame, which for a known length is nothing but the data.
        self.conn.send_with_data_passthrough(h11.Data(data=cast(bytes, _Announced(count))))
        try:
            sent = await self.loop.sendfile(self.transport, message["file"], message["offset"], count, fallback=False)
        except ConnectionError:
            self.transport.abort()  # the reader has gone
            return
        if sent < count:
            raise OSError(f"the file ends {count - sent} bytes before what was promised")


class _Announced:
    """Something with a length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length
