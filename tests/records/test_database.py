"""Migrations, the clock, and what a database that is away looks like."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from app.errors import MergeyardError
from app.records.database import Database
from app.records.jobs import Jobs
from app.records.tables import metadata
from tests import servers
from tests.records.submitting import new_job


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/folder/empty.sqlite3"
        return
    with servers.temporary_database(request.getfixturevalue("postgres_url")) as url:
        yield url


def test_the_migrations_make_exactly_the_tables(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_the_migrations_make_exactly_the_indexes(empty_url: str) -> None:
    """With their conditions, which the comparison above does not look at."""
    database = Database(empty_url)
    database.migrate()
    with database.write() as connection:
        migrated = definitions(connection)
        for table in metadata.sorted_tables:
            for index in table.indexes:
                index.drop(connection)
                index.create(connection)
        assert definitions(connection) == migrated
    database.close()


def definitions(connection: Connection) -> set[str]:
    of_sqlite = "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    of_postgresql = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'"
    return set(connection.scalars(text(of_sqlite if connection.dialect.name == "sqlite" else of_postgresql)))


def test_an_unmigrated_database_is_not_ready(empty_url: str) -> None:
    database = Database(empty_url)
    with pytest.raises(MergeyardError, match="mergeyard migrate") as caught:
        database.check()
    assert caught.value.code == "not_ready"
    database.migrate()
    database.check()
    database.close()


def test_many_processes_may_migrate_at_once(empty_url: str) -> None:
    databases, failures = [Database(empty_url) for _ in range(4)], []

    def migrate(database: Database) -> None:
        try:
            database.migrate()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=migrate, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    databases[0].check()
    for database in databases:
        database.close()


def test_a_migration_in_progress_shows_nothing_to_readers(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.write() as connection:
        connection.execute(text("CREATE TABLE half_done (x INTEGER)"))
        with database.read() as reader:
            found = reader.execute(text("SELECT name FROM sqlite_master WHERE name = 'half_done'")).all()
    assert found == []
    database.close()


def test_sqlite_writes_ahead_syncs_fully_and_keeps_foreign_keys(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as connection:
        found = {
            pragma: connection.execute(text(f"PRAGMA {pragma}")).scalar_one()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 15000}
    database.close()


def test_a_locked_sqlite_is_waited_for(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), check_same_thread=False, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    threading.Timer(1.0, holder.rollback).start()
    began = time.monotonic()
    job, _ = Jobs(database).submit(new_job())
    assert time.monotonic() - began > 0.5, "it was locked"
    assert Jobs(database).get(job.id) == job
    holder.close()
    database.close()


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    job, _ = Jobs(database).submit(new_job())
    with database.write() as connection:
        connection.execute(text("UPDATE jobs SET priority = 9"))
        began = time.monotonic()
        assert Jobs(database).get(job.id).priority == 0
        assert time.monotonic() - began < 1


def test_the_clock_is_utc_and_moves(database: Database) -> None:
    first = database.now()
    time.sleep(0.01)
    assert first.tzinfo is UTC
    assert database.now() > first


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_database_that_is_away_is_a_clear_error(scheme: str) -> None:
    database = Database(f"{scheme}://nobody@127.0.0.1:1/nothing")
    for call in (database.check, database.now, database.migrate):
        with pytest.raises(MergeyardError) as caught:
            call()
        assert caught.value.code == "database_unavailable"


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    jobs = Jobs(database)
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(text("DELETE FROM events"))
        raise ZeroDivisionError
    job, _ = jobs.submit(new_job())
    assert len(jobs.events(job.id)) == 1
