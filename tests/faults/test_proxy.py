"""The fault proxy itself: what each fault does to a connection."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests import servers
from tests.faults.proxy import Proxy, proxied


@contextmanager
def echo(path: Path) -> Iterator[Path]:
    """A server that sends back what it gets, and says END when its client has said all."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)
            connection.sendall(b"END")

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Before an echo; nothing breaks by itself."""
    with servers.short_folder() as folder, ExitStack() as stack:
        target = stack.enter_context(echo(folder / "echo.sock"))
        made = Proxy(folder / "proxy.sock", target, random.Random(0), {"none": 1})
        yield stack.enter_context(proxied(made))


@contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(proxy.listen))
        assert say(client, b"hello") == b"hello"
        yield client


def say(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return client.recv(1 << 16)


def test_without_a_fault_everything_passes_and_the_end_too(proxy: Proxy) -> None:
    with connected(proxy) as client:
        data = random.Random(1).randbytes(1 << 20)
        threading.Thread(target=client.sendall, args=(data,)).start()
        found = b""
        while len(found) < len(data):
            found += client.recv(1 << 16)
        assert found == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(16) == b"END"
        assert client.recv(16) == b""


def test_a_cut_ends_both_ways(proxy: Proxy) -> None:
    with connected(proxy) as client:
        proxy.break_all("cut")
        with suppress(ConnectionError):
            assert say(client, b"x") == b""
    assert proxy.faults == {"cut": 1}


def test_a_connection_that_carries_too_much_is_cut(proxy: Proxy) -> None:
    proxy.cut_after = 5
    with connected(proxy) as client, suppress(ConnectionError):
        assert say(client, b"x") == b""
    assert proxy.faults == {"cut": 1}


def test_a_half_closed_connection_has_one_way_left(proxy: Proxy) -> None:
    proxy.rng = random.Random(1)  # closes the server's half
    with connected(proxy) as client:
        proxy.break_all("half-close")
        assert client.recv(16) in (b"END", b"")


def test_what_is_swallowed_never_comes_and_the_connection_stays(proxy: Proxy) -> None:
    with connected(proxy) as client:
        proxy.break_all("swallow")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            say(client, b"x")


def test_a_delay_is_late_and_whole(proxy: Proxy) -> None:
    with connected(proxy) as client:
        proxy.break_all("delay")
        assert say(client, b"late") == b"late"


def test_every_connections_fate_is_drawn_from_the_seed() -> None:
    with servers.short_folder() as folder, echo(folder / "echo.sock") as target:
        weights, lifetime = {"cut": 1.0, "none": 1.0}, (0.0, 0.0)
        with proxied(Proxy(folder / "proxy.sock", target, random.Random(3), weights, lifetime)) as proxy:
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(5)
                    client.connect(str(proxy.listen))
                    with suppress(OSError):
                        say(client, b"x")
        assert proxy.connections == 20 and 0 < proxy.faults["cut"] < 20


def test_a_server_that_is_away_is_a_connection_that_ends() -> None:
    with servers.short_folder() as folder:
        nobody = Proxy(folder / "proxy.sock", folder / "nobody.sock", random.Random(0), {"none": 1})
        with proxied(nobody), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(nobody.listen))
            with suppress(ConnectionError):
                assert say(client, b"x") == b""
