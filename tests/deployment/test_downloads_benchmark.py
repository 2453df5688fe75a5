"""The machinery of `benchmarks.downloads` on a small file. No test looks at a time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import downloads
from tests.deployment import nginx


def test_every_way_sends_the_whole_file_in_every_round(tmp_path: Path) -> None:
    nginx.binary()
    size = 5_000_000
    run = downloads.measure(tmp_path, size=size, rounds=2, at_once=3, size_at_once=1_000_000, tell=lambda _: None)
    assert {arm: [one["size"] for one in ones] for arm, ones in run["downloads"].items()} == {
        downloads.ALONE: [size] * 2,
        downloads.API: [size] * 2,
        downloads.ACCEL: [size] * 2,
    }
    assert (run["together"]["downloads"], run["together"]["size_of_each"]) == (3, 1_000_000)
    text = downloads.report({**run, "began": "2026-01-01", "commit": "x", "machine": "x", "load": 0.0})
    assert text.count("GB/s |") == 3 and "3 downloads of 1 MB at once" in text


def test_a_ratio_is_of_the_same_round_and_the_report_says_what_was_missed() -> None:
    def ones(*seconds: float) -> list[dict[str, float]]:
        return [asdict(downloads.Download(100, each, 0.0)) for each in seconds]

    arms = {downloads.ALONE: ones(1, 10, 1), downloads.API: ones(2, 20, 1), downloads.ACCEL: ones(1, 10, 2)}
    together = asdict(downloads.Together(32, 100, 1.0, 0, 33_000_000))
    run = {"downloads": arms, "together": together, "size": 100}
    assert (downloads.ratio(run, downloads.API), downloads.ratio(run, downloads.ACCEL)) == (0.5, 1.0)
    assert not downloads.reached(run)
    text = downloads.report({**run, "began": "2026-01-01", "commit": "x", "machine": "x", "load": 0.0, "others": 0.5})
    assert text.count("**missed**") == 2 and "The machine was busy" in text


def test_the_order_moves_on() -> None:
    assert [downloads.turned("abc", number) for number in range(3)] == [list("abc"), list("bca"), list("cab")]


def test_a_client_that_gets_less_than_it_was_promised_says_so() -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(AssertionError, match="7 bytes are missing"):
            downloads.download(server.getsockname()[1], "/")
