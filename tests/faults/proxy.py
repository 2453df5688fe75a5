"""A proxy that breaks connections: cuts them, delays what passes, closes one half, swallows everything, refuses.

It stands between a client and a server on Unix sockets or TCP. A connection's fate is drawn from ``rng`` when it comes,
and comes to it after a random time; ``Proxy.break_all`` decides for those that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

FAULTS = ("cut", "delay", "half-close", "swallow")
PIECE = 1 << 16
DELAY_SECONDS = 0.5  # of a piece, at most
SLOW_SECONDS = 2.0  # a connection is slow for as long, and well again

Address = Path | tuple[str, int]


@dataclass
class Proxy:
    """``weights``: how often each fault is drawn; "none" lets a connection live. ``lifetime``: seconds to the fault."""

    listen: Address
    target: Address
    rng: random.Random
    weights: Mapping[str, float]
    lifetime: tuple[float, float] = (0.05, 4.0)
    faults: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    calm: bool = False  # new connections are left alone
    cut_after: int | None = None  # bytes of the server's: whatever carries more is cut there
    port: int = 0
    _open: set[Link] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def break_all(self, fault: str) -> None:
        """Give every connection that is open now the same fate. From any thread."""

        async def strike() -> None:
            for link in list(self._open):
                link.strike(fault)

        asyncio.run_coroutine_threadsafe(strike(), self._loop).result(10)

    def hang(self) -> None:
        """Become a server that takes connections and never answers, until ``recover``. From any thread."""
        self.weights, self.lifetime, self.calm = {"swallow": 1}, (0.0, 0.0), False
        self.break_all("swallow")

    def recover(self) -> None:
        """Leave new connections alone, and end those that are open. From any thread."""
        self.calm = True
        self.break_all("cut")

    async def _serve(self, ready: threading.Event, stopping: asyncio.Event) -> None:
        if isinstance(self.listen, Path):
            server = await asyncio.start_unix_server(self._accept, self.listen)
        else:
            server = await asyncio.start_server(self._accept, *self.listen)
            self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stopping.wait()
        server.close()
        for link in list(self._open):
            link.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if isinstance(self.target, Path):
                upstream = await asyncio.open_unix_connection(self.target)
            else:
                upstream = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), upstream)
        self._open.add(link)
        if not self.calm:
            fault = self.rng.choices(list(self.weights), list(self.weights.values()))[0]
            if fault != "none":
                self._loop.call_later(self.rng.uniform(*self.lifetime), link.strike, fault)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the proxy ends; asyncio would tell of it at length
                await link.carry()
        finally:
            self._open.discard(link)


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link:
    """One client's connection and the one to the server behind it."""

    def __init__(self, proxy: Proxy, client: Ends, server: Ends) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._fault = ""

    async def carry(self) -> None:
        """Both ways, until an end closes or the fault does."""
        to_server = self._pass_on(self._client[0], self._server[1], None)
        to_client = self._pass_on(self._server[0], self._client[1], self._proxy.cut_after)
        await asyncio.gather(to_server, to_client)
        self.close()

    def strike(self, fault: str) -> None:
        """Let the fault come. A cut comes to a broken connection too; nothing else does."""
        if self not in self._proxy._open or (self._fault and fault != "cut"):
            return
        self._proxy.faults[fault] += 1
        self._fault = fault
        if fault == "cut":
            self.close()
        if fault == "delay":
            self._proxy._loop.call_later(SLOW_SECONDS, self._recover)
        if fault == "half-close":
            with contextlib.suppress(OSError):
                self._proxy.rng.choice((self._client, self._server))[1].write_eof()

    def _recover(self) -> None:
        if self._fault == "delay":
            self._fault = ""

    def close(self) -> None:
        for _, writer in (self._client, self._server):
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut_after: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(PIECE):
                if self._fault == "swallow":
                    continue
                passed += len(data)
                if cut_after is not None and passed > cut_after:
                    self.strike("cut")
                    return
                if self._fault == "delay":
                    await asyncio.sleep(self._proxy.rng.uniform(0, DELAY_SECONDS))
                writer.write(data)
                await writer.drain()
            if not writer.is_closing():
                writer.write_eof()


@contextmanager
def proxied(proxy: Proxy) -> Iterator[Proxy]:
    """Run the proxy in a thread of its own."""
    ready, loop = threading.Event(), proxy._loop
    stopping = asyncio.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(proxy._serve(ready, stopping))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, name="proxy", daemon=True)
    thread.start()
    assert ready.wait(10), "the proxy does not start"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
