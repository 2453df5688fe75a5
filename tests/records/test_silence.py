"""A PostgreSQL that takes connections and answers nothing: a server that hangs, seen through a proxy that swallows."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text

from app.errors import MergeyardError
from app.records.database import MIGRATION_LOCK, Database
from app.records.jobs import Jobs
from tests.faults.cuts import server_address, through
from tests.faults.proxy import Proxy, proxied
from tests.records.submitting import new_job

SECONDS = 0.6  # for an answer
PATIENCE = 30.0  # of a test, which would else wait for ever


@pytest.fixture
def url(postgres_database: str) -> str:
    return postgres_database


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    """Before the server; nothing breaks by itself."""
    with proxied(Proxy(("127.0.0.1", 0), server_address(url), random.Random(0), {"none": 1})) as made:
        yield made


@pytest.fixture
def database(url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """By way of the proxy."""
    monkeypatch.setattr("app.records.postgresql.CONNECT_SECONDS", 2)
    found = Database(through(url, proxy.port), answer_seconds=SECONDS)
    yield found
    found.close()


def refused(call: Callable[[], object]) -> bool:
    """Whether the call came to its end with ``database_unavailable``."""
    codes = []

    def run() -> None:
        try:
            call()
        except MergeyardError as error:
            codes.append(error.code)

    calling = threading.Thread(target=run, daemon=True)
    calling.start()
    calling.join(PATIENCE)
    return codes == ["database_unavailable"]


def test_a_server_that_hangs_is_a_clear_error_and_one_that_is_back_is_used(database: Database, proxy: Proxy) -> None:
    database.now()
    proxy.hang()
    assert refused(database.now), "on the connection that it had"
    assert refused(database.now), "on one that it would make"
    proxy.recover()
    assert database.now() is not None


def test_a_statement_that_is_never_answered_ends(database: Database, proxy: Proxy) -> None:
    def interrupted() -> None:
        with database.write() as connection:
            connection.execute(text("SELECT 1"))
            proxy.hang()
            connection.execute(text("SELECT 2"))

    assert refused(interrupted)


def test_a_commit_that_is_never_answered_ends(database: Database, proxy: Proxy) -> None:
    def interrupted() -> None:
        with database.write() as connection:
            connection.execute(text("SELECT 1"))
            proxy.hang()

    assert refused(interrupted)


def test_one_caller_at_a_time_asks_a_server_that_is_silent(
    database: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.records.postgresql.TURN_SECONDS", 0.0)
    proxy.hang()
    assert refused(database.now)
    before = proxy.connections
    together = threading.Barrier(10)

    def ask() -> bool:
        together.wait()
        return refused(database.now)

    with ThreadPoolExecutor(10) as pool:
        assert all(asking.result(PATIENCE) for asking in [pool.submit(ask) for _ in range(10)])
    assert proxy.connections == before + 1


def test_a_lock_that_is_never_let_go_ends_the_wait_and_not_the_connection(url: str) -> None:
    database = Database(url, answer_seconds=SECONDS)
    job, _ = Jobs(database).submit(new_job())
    with psycopg.connect(url) as holder:
        holder.execute("UPDATE jobs SET priority = 1 WHERE id = %s", (job.id,))
        with database.read() as connection:
            session = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        assert refused(lambda: Jobs(database).request_cancel(job.id))
        with database.read() as connection:
            assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == session
    database.close()


def test_whoever_froze_within_a_transaction_lets_go_of_its_rows(url: str) -> None:
    frozen, other = Database(url, answer_seconds=SECONDS), Database(url, answer_seconds=PATIENCE)
    job, _ = Jobs(other).submit(new_job())

    def freeze() -> None:
        with frozen.write() as connection:
            connection.execute(text("UPDATE jobs SET priority = 1 WHERE id = :id"), {"id": job.id})
            assert Jobs(other).request_cancel(job.id).priority == job.priority
            connection.execute(text("SELECT 1"))

    assert refused(freeze)
    frozen.close()
    other.close()


def test_a_migration_takes_the_time_that_it_takes(url: str) -> None:
    database = Database(url, answer_seconds=SECONDS)
    with psycopg.connect(url) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
        with ThreadPoolExecutor(1) as pool:
            migrating = pool.submit(database.migrate)
            with pytest.raises(TimeoutError):
                migrating.result(SECONDS * 3)
            holder.execute("SELECT pg_advisory_unlock(%s)", (MIGRATION_LOCK,))
            migrating.result(PATIENCE)
    with database.read() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == f"{int(SECONDS * 800)}ms"
    database.close()
