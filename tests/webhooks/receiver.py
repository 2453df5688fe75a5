"""A server that receives webhooks, and behaves as a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Received:
    headers: Mapping[str, str]
    body: bytes
    path: str


Behaviour = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Receiver:
    """``behaviours`` are one a request, the last one again and again; ``received`` is what came."""

    port: int = 0
    behaviours: list[Behaviour] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def until(self, count: int, seconds: float = 20) -> Sequence[Received]:
        deadline = time.monotonic() + seconds
        while len(self.received) < count:
            assert time.monotonic() < deadline, f"only {len(self.received)} came"
            time.sleep(0.02)
        return self.received


def answering(status: int, headers: Mapping[str, str] | None = None) -> Behaviour:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hanging(release: threading.Event) -> Behaviour:
    return lambda handler: (release.wait(60), None)[1]


def dripping(release: threading.Event) -> Behaviour:
    """An answer that comes byte by byte and never ends."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not release.wait(0.05):
                handler.wfile.write(b"x")
                handler.wfile.flush()

    return drip


def endless(sent: list[int]) -> Behaviour:
    """An answer whose body never ends; ``sent`` counts its pieces of 64 kB."""

    def pour(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(2000):
                handler.wfile.write(bytes(65_536))
                sent.append(65_536)

    return pour


@contextmanager
def receiving(*behaviours: Behaviour) -> Iterator[Receiver]:
    """A receiver on this machine; without behaviours it answers 204."""
    receiver = Receiver(behaviours=list(behaviours) or [answering(204)])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            behave = receiver.behaviours[min(len(receiver.received), len(receiver.behaviours) - 1)]
            receiver.received.append(
                Received({name.lower(): value for name, value in self.headers.items()}, body, self.path)
            )
            self.close_connection = True
            behave(self)

        do_GET = do_POST  # noqa: N815 — whoever follows a redirect asks with GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
