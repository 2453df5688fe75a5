"""What else the machine computes while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
from sqlalchemy import text

from app.records.database import Database
from benchmarks.watch import machine_seconds


class Strangers:
    """From its making on: processor time that neither this process, its descendants nor the databases' servers have.

    PostgreSQL must run on this machine; it is no descendant of the process that uses it.
    """

    def __init__(self, *databases: Database) -> None:
        self._servers = {server for database in databases if (server := _server(database)) is not None}
        self._began = time.monotonic()
        self._machine, self._own = machine_seconds(), self._seconds()

    def share(self) -> float:
        """Of all cores' time so far, between 0 and 1."""
        busy = machine_seconds() - self._machine
        whole = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, busy - (self._seconds() - self._own)) / whole

    def _seconds(self) -> float:
        return sum(_with_descendants(psutil.Process())) + sum(
            seconds for server in self._servers for seconds in _with_descendants(server)
        )


def _with_descendants(process: psutil.Process) -> Iterator[float]:
    """Seconds of each, with those of its children that have ended."""
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            yield times.user + times.system + times.children_user + times.children_system


def _server(database: Database) -> psutil.Process | None:
    if database.engine.dialect.name != "postgresql":
        return None
    with database.read() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return psutil.Process(backend).parent()
