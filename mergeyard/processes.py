"""Processes that belong together: started in order, started again when they die, stopped in the opposite order."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 0.2
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
SETTLED_SECONDS = 60.0  # a part that lived this long starts again with the first pause
STARTS = 3  # tries before a part that never came up is given up
LOG_BYTES = 10_000_000  # a log larger than this at the start is moved aside
TAIL_BYTES = 2_000


class StartError(Exception):
    """The service cannot start; the text says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process to keep running. ``is_ready`` is asked until it says so before the next part starts."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float
    pass_fds: tuple[int, ...] = ()
    is_ready: Callable[[], bool] = field(default=lambda: True)


class Supervisor:
    """Keeps ``parts`` running until ``stopping`` is set. Use from the main thread only: Linux ends a child with the
    *thread* that started it (prctl(2), PR_SET_PDEATHSIG).
    """

    def __init__(self, parts: Sequence[Part], stopping: threading.Event, say: Callable[[str], None]) -> None:
        self._running = [_Running(part) for part in parts]
        self._stopping = stopping
        self._say = say

    def start(self, ready_seconds: float) -> None:
        """Start every part, each when those before it are ready. Raises StartError with the end of the part's log."""
        deadline = time.monotonic() + ready_seconds
        for position, running in enumerate(self._running):
            if self._stopping.is_set():
                return
            running.start()
            while not self._stopping.is_set() and not (running.alive() and running.part.is_ready()):
                self._revive(self._running[: position + 1])
                if running.deaths >= STARTS or time.monotonic() > deadline:
                    raise StartError(f"{running.part.name} does not start. Its log ends:\n{running.tail()}")
                self._stopping.wait(LOOK_SECONDS / 2)

    def watch(self) -> None:
        """Start again whatever dies, until ``stopping`` is set."""
        while not self._stopping.wait(LOOK_SECONDS):
            self._revive(self._running)

    def stop(self) -> None:
        """Stop every part, the last one first. A second request to stop while this runs ends them at once."""
        self._stopping.clear()
        for running in reversed(self._running):
            running.stop(self._stopping)

    def _revive(self, parts: Sequence[_Running]) -> None:
        for running in parts:
            if (note := running.look()) is not None:
                self._say(note)


class _Running:
    """A part and its process, while there is one."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.deaths = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._start_at: float | None = None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        if self.part.log.exists() and self.part.log.stat().st_size > LOG_BYTES:
            self.part.log.replace(self.part.log.with_suffix(".log.1"))
        with self.part.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own commands)
                self.part.command,
                env=dict(self.part.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self.part.pass_fds,
                # Ctrl-C reaches the foreground group; the parts are not in it, because they stop in our order.
                start_new_session=True,
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 (no other thread lives here)
            )
        self._started = time.monotonic()
        self._start_at = None

    def look(self) -> str | None:
        """Notice a death, or start again when the pause is over; returns what there is to say about it."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._end_group()
            self._process = None
            if time.monotonic() - self._started > SETTLED_SECONDS:
                self.deaths = 0
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.deaths)
            self.deaths += 1
            self._start_at = time.monotonic() + pause
            return f"{self.part.name} {_ended(code)}; starting it again in {pause:g} s. Its log: {self.part.log}"
        if self._start_at is not None and time.monotonic() >= self._start_at:
            self.start()
        return None

    def stop(self, hurry: threading.Event) -> None:
        """SIGTERM, and after ``stop_seconds`` (or when ``hurry`` is set) SIGKILL for it and all it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        deadline = time.monotonic() + self.part.stop_seconds
        while self._process.poll() is None and time.monotonic() < deadline and not hurry.is_set():
            hurry.wait(LOOK_SECONDS / 4)
        self._end_group()
        self._process.wait()
        self._process = None

    def tail(self) -> str:
        with suppress(OSError):
            return self.part.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
        return ""

    def _end_group(self) -> None:
        """A part's own children are in its session; none of them may outlive it."""
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes the program: have the kernel end it when we end, even by SIGKILL."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def settle() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return settle


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}"
