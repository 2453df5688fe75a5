"""The whole service as the processes that run it anywhere: ``mergeyard api`` under uvicorn, ``mergeyard worker``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from app.records.database import Database
from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0


@contextmanager
def running(settings: Settings, *, workers: int = 0) -> Iterator[httpx.Client]:
    """An API with its janitor, and so many workers, on a migrated database and a broker that runs; its client.

    What the processes say goes to logs in the data folder. All end with the block.
    """
    settings.root.mkdir(parents=True, exist_ok=True)
    environment = _environment(settings)
    with ExitStack() as stack, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        descriptor = listener.fileno()
        stack.enter_context(_process(settings, environment, "api", "--fd", str(descriptor), passed=(descriptor,)))
        for number in range(workers):
            stack.enter_context(_process(settings, environment, "worker", log=f"worker-{number + 1}"))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        deadline = time.monotonic() + START_SECONDS
        while not _ready(client):
            assert time.monotonic() < deadline, f"the API does not start; see {settings.root}"
            time.sleep(0.1)
        yield client


def migrated(url: str) -> Database:
    """The database, brought to this version's schema."""
    database = Database(url)
    database.migrate()
    return database


def _environment(settings: Settings) -> Mapping[str, str]:
    values = settings.model_dump(mode="json", exclude={"host", "port"})
    ours = {f"MERGEYARD_{name.upper()}": str(value) for name, value in values.items() if value not in ("", None)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MERGEYARD_")}
    return {**kept, "PYTHONPATH": str(ROOT), **ours}


@contextmanager
def _process(
    settings: Settings, environment: Mapping[str, str], *words: str, log: str = "", passed: tuple[int, ...] = ()
) -> Iterator[None]:
    with (settings.root / f"{log or words[0]}.log").open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mergeyard.cli", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=passed,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
