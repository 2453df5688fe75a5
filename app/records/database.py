"""The database: one engine on SQLite or PostgreSQL, its transactions, its clock and its migrations."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

import migrations
from app.errors import MergeyardError
from app.records.postgresql import Silence, postgresql, wait_for_ever
from app.records.tables import UtcTime

BUSY_SECONDS = 15.0
ANSWER_SECONDS = 10.0
MIGRATION_LOCK = 0x6D657267  # "merg": the PostgreSQL advisory lock every migrating process takes


class Database:
    """Connections to the database at ``url``: ``sqlite:///path`` or ``postgresql://…`` (psycopg 3).

    Safe to share between threads, not between processes. Where the database cannot be reached, every method
    raises MergeyardError ``database_unavailable``.
    """

    def __init__(self, url: str, *, answer_seconds: float | None = ANSWER_SECONDS) -> None:
        """``answer_seconds``: how long PostgreSQL may take to answer a statement. None is for whoever has all day."""
        lite = make_url(url).get_backend_name() == "sqlite"
        self.engine = _sqlite(url) if lite else postgresql(url, answer_seconds)
        self._reader = self.engine.execution_options(mergeyard_reads=True)
        self._silence = Silence()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.engine.dialect.name

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; commits at the end of the block, rolls back when it raises."""
        with self._transaction(self.engine) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on SQLite it never waits for a writer."""
        with self._transaction(self._reader) as connection:
            yield connection

    def now(self) -> datetime:
        """The database's clock, UTC: the only clock that leases and times are compared by."""
        with self.read() as connection:
            return clock(connection)

    def check(self) -> None:
        """Raise unless the database answers (``database_unavailable``) and is migrated (``not_ready``)."""
        with self.read() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        wanted = ScriptDirectory.from_config(migrations_config()).get_current_head()
        if found != wanted:
            raise MergeyardError(
                "not_ready",
                f"The database's schema is {found or 'empty'} and this version needs {wanted}: "
                "run `mergeyard migrate`.",
            )

    def migrate(self) -> None:
        """Bring the schema to this version. Processes that do so at once wait for the first one."""
        config = migrations_config()
        with self.write() as connection:  # on SQLite this transaction holds the only write lock
            if self.dialect == "postgresql":
                wait_for_ever(connection)
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        try:
            with self._silence.asking():
                connection = engine.connect()  # a new one, or one that answered: see ``pool_pre_ping``
            with connection, connection.begin():
                yield connection
        except DBAPIError as error:
            if not (isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated):
                raise
            self._silence.note(error)
            raise MergeyardError(
                "database_unavailable",
                "The database cannot be reached or cannot be written to; try again shortly.",
            ) from error
        except PoolTimeout as error:
            message = "Every database connection is in use; try again in a moment."
            raise MergeyardError("database_unavailable", message) from error


def clock(connection: Connection) -> datetime:
    """The database's time, read within the transaction that uses it."""
    if connection.dialect.name == "sqlite":
        moment = connection.execute(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(moment).replace(tzinfo=UTC)
    moment = connection.execute(text("SELECT clock_timestamp() AS now").columns(now=UtcTime)).scalar_one()
    return cast(datetime, moment)


def migrations_config() -> Config:
    """Alembic's, for this package's migrations; ``attributes["connection"]`` is the caller's to set."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    return config


def _sqlite(url: str) -> Engine:
    location = make_url(url)
    if not location.database or location.database == ":memory:":
        raise ValueError("SQLite needs a file: sqlite:///path/to/file")
    Path(location.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(location, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _settle(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin transactions by guessing
        _write_ahead(connection)
        # FULL and not NORMAL: in WAL mode NORMAL may forget the last commits when the power goes, and a merge
        # that was answered with 202 must not be forgotten. The price is one fsync a commit; commits are few.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes the lock before it reads: upgrading later fails at once instead of waiting.
        reads = connection.get_execution_options().get("mergeyard_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite does not wait its busy timeout for this one, so two first-comers try again."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
