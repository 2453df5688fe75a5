"""PostgreSQL's connections: every statement comes to an end, whatever the server and the network do.

A network that swallows packets is TCP's to notice. A server that has hung is not: its machine goes on acknowledging
what it gets. There only this side can tell that no answer comes, by its own clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from app.errors import MergeyardError

CONNECT_SECONDS = 5
# libpq's, for TCP: a network that swallows packets is an error within half a minute, not a wait for ever.
_NETWORK_DIED = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
POOL_SECONDS = 10.0  # a caller waits this long for one of the connections
TURN_SECONDS = 1.0


class NoAnswer(psycopg.OperationalError):
    """The server did not answer in time."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that waits for ``answer_seconds`` and no longer; None waits for ever.

    It is closed when they are over: nobody knows what becomes of the statement.
    """

    answer_seconds: float | None = None

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        """psycopg's, through which everything goes but connecting."""
        if self.answer_seconds is None:
            return super().wait(gen, *arguments, **options)
        try:
            return super().wait(_bounded(gen, self.answer_seconds), *arguments, **options)
        except NoAnswer:
            self.close()
            raise


def _bounded(gen: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """``gen``, which psycopg wakes ten times a second where nothing comes, until its time is over."""
    deadline = time.monotonic() + seconds
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            wanted = gen.send(ready)
            if time.monotonic() > deadline:
                raise NoAnswer(f"the server did not answer within {seconds:g} s")
    except StopIteration as end:
        return end.value


def postgresql(url: str, answer_seconds: float | None) -> Engine:
    """An engine for ``url`` (``postgresql://…``, psycopg 3), whose statements end within ``answer_seconds`` each."""
    location = make_url(url)
    if location.drivername in ("postgresql", "postgres"):
        location = location.set(drivername="postgresql+psycopg")
    engine = create_engine(
        location,
        pool_pre_ping=True,
        pool_timeout=POOL_SECONDS,
        connect_args={"connect_timeout": CONNECT_SECONDS, **_NETWORK_DIED},
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, parameters: Any) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **parameters)
        connection.answer_seconds = answer_seconds
        return connection

    @event.listens_for(engine, "connect")
    def _settle(connection: psycopg.Connection[Any], _record: Any) -> None:
        if answer_seconds is None:
            return
        # A server that is well ends a statement first (it waits for a lock, say), which leaves the connection whole.
        # And it lets go of what a process held that froze, or was cut off, within a transaction.
        limits = {
            "statement_timeout": answer_seconds * 0.8,
            "idle_in_transaction_session_timeout": answer_seconds * 2,
        }
        connection.autocommit = True
        for name, seconds in limits.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, str(int(seconds * 1000))))
        connection.autocommit = False

    return engine


def wait_for_ever(connection: Connection) -> None:
    """Take the limits from a connection, and the connection from its pool: a migration takes the time that it takes."""
    bounded = connection.connection.driver_connection
    assert isinstance(bounded, BoundedConnection)
    connection.detach()
    bounded.answer_seconds = None
    connection.execute(text("SET statement_timeout = 0"))
    connection.execute(text("SET idle_in_transaction_session_timeout = 0"))


class Silence:
    """While the server is known to be silent, one caller at a time asks it; who waits longer than TURN_SECONDS for
    their turn is refused. Else every thread of a process would soon wait for an answer, and the next request for them.
    """

    def __init__(self) -> None:
        self._silent = False
        self._turn = threading.Lock()

    def note(self, error: DBAPIError) -> None:
        """A connection or a statement failed; perhaps because nobody answered."""
        if isinstance(error.orig, NoAnswer | psycopg.errors.ConnectionTimeout):
            self._silent = True

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around what shows whether the server answers. Raises MergeyardError ``database_unavailable``."""
        if not self._silent:
            yield
            return
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise MergeyardError("database_unavailable", "The database does not answer; try again shortly.")
        try:
            yield
            self._silent = False
        finally:
            self._turn.release()
