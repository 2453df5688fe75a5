"""Fixtures that several parts of the tests share. Servers start when the first test asks, and stop at the end."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.records.database import Database
from app.records.jobs import Jobs
from app.records.tables import metadata
from tests import servers, tiny
from tests.objects.s3 import Bucket, new_bucket, s3_server


def pytest_report_header() -> list[str]:
    return servers.described()


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    """A real broker. Use ``queue`` with it: other tests use the same one."""
    with servers.broker() as url:
        yield url


@pytest.fixture
def queue(broker_url: str) -> Iterator[str]:
    """A queue nobody else uses."""
    name = f"test-{secrets.token_hex(6)}"
    yield name
    servers.forget_queue(broker_url, name)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL server; make databases with ``servers.temporary_database``."""
    with servers.postgresql() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """A migrated database; ``postgres_database`` is the same one, empty."""
    with servers.temporary_database(postgres_url) as url:
        database = Database(url)
        database.migrate()
        database.close()
        yield url


@pytest.fixture
def postgres_database(migrated_postgres: str) -> str:
    """A migrated database that every test finds empty: emptying it takes a tenth of making another."""
    servers.empty(migrated_postgres, metadata.tables)
    return migrated_postgres


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file, to be copied: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()  # the last connection of WAL mode leaves one complete file
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A migrated SQLite database of the test's own."""
    path = tmp_path / "records.sqlite3"
    path.write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A migrated database of the test's own, once on each kind of server."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    yield request.getfixturevalue("postgres_database")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    found = Database(database_url)
    yield found
    found.close()


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model root with ``tiny-llama`` and the adapters ``sql`` and ``json``; read only, see ``tests.tiny``."""
    return tiny.write_root(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real S3 server; make buckets with ``new_bucket``."""
    with servers.short_folder() as folder, s3_server(folder) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    """An empty one."""
    return new_bucket(s3_endpoint)
