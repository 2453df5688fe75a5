"""A Mergeyard service for as long as a `with` block lasts: `mergeyard up`, everything embedded, in its own folder.

It is ended on every way out of the block: SIGTERM first, and SIGKILL for whatever is left of it after a grace.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

READY_SECONDS = 120.0
GRACE_SECONDS = 20.0
LOG_LINES = 30


class ServiceDiedError(Exception):
    """The service ended, or never became ready; the message has the end of its log."""


@contextmanager
def local_service(model_roots: Path) -> Iterator[str]:
    """The URL of a service that is ready to merge what lies below `model_roots`."""
    with tempfile.TemporaryDirectory(prefix="mergeyard-demo-", ignore_cleanup_errors=True) as folder:
        log, port = Path(folder) / "service.log", _free_port()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [_command(), "up", "--port", str(port), "--data-dir", str(Path(folder) / "data")],
                env=_environment(model_roots),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the service in order
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _stop(process)


def _command() -> str:
    """The `mergeyard` beside the running Python: the demo's environment, whatever is on the PATH."""
    return str(Path(sys.executable).with_name("mergeyard"))


def _environment(model_roots: Path) -> dict[str, str]:
    """This environment without its MERGEYARD_* settings, which are about another service."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MERGEYARD_")}
    return inherited | {"MERGEYARD_MODEL_ROOTS": str(model_roots)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServiceDiedError(f"mergeyard up ended with code {process.returncode}\n{_tail(log)}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise ServiceDiedError(f"mergeyard up was not ready after {READY_SECONDS:.0f} s\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Nothing of its session may outlive it, whether it ended in order or not.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
