"""The API on SQLite and on PostgreSQL: one that tests share, and fresh ones for those that need an empty list."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.records.database import Database
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests import servers
from tests.api.serving import GuardedApi, ServedApi, serving, write_sources


@pytest.fixture(scope="session")
def sources_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("api-models"))


@pytest.fixture(scope="session")
def api_broker() -> Iterator[str]:
    """A broker of the API's tests alone: nobody answers its doorbells."""
    with servers.short_folder() as folder, servers.valkey(folder / "valkey.sock") as url:
        yield url


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sources_root: Path, api_broker: str
) -> Iterator[ServedApi]:
    """One API for the session on each database; a test finds other tests' merges in it."""
    data = tmp_path_factory.mktemp(f"api-{request.param}")
    if request.param == "sqlite":
        path = data / "records.sqlite3"
        path.write_bytes(request.getfixturevalue("sqlite_template").read_bytes())
        with serving(_settings(data, f"sqlite:///{path}", sources_root, api_broker)) as served:
            yield served
        return
    with servers.temporary_database(request.getfixturevalue("postgres_url")) as url:
        database = Database(url)
        database.migrate()
        database.close()
        with serving(_settings(data, url, sources_root, api_broker)) as served:
            yield served


@pytest.fixture
def fresh_api(database_url: str, tmp_path: Path, sources_root: Path, api_broker: str) -> Iterator[ServedApi]:
    """An API with nothing in it."""
    with serving(_settings(tmp_path / "data", database_url, sources_root, api_broker)) as served:
        yield served


@pytest.fixture
def guarded(fresh_api: ServedApi) -> Iterator[GuardedApi]:
    """An API of the test's own with a key of every kind: alice's, bob's, an admin's, and those that open nothing."""
    database = Database(fresh_api.settings.database)
    found = Keys(database)

    def make(owner: str, *scopes: Scope, **rest: Any) -> str:
        return found.create(owner=owner, scopes=scopes, by=Caller(owner="cli:tests"), **rest).text

    revoked = make("alice", *Scope)
    found.revoke(revoked[4:16], by=Caller(owner="cli:tests"))
    keys = {
        "nobody": "",
        "wrong": make("alice", *Scope)[:17] + "0" * 32,
        "expired": make("alice", *Scope, expires_in=timedelta(0)),
        "revoked": revoked,
        "reader": make("alice", Scope.READ),
        "merger": make("alice", Scope.MERGE),
        "alice": make("alice", Scope.READ, Scope.MERGE),
        "bob": make("bob", Scope.READ, Scope.MERGE),
        "scraper": make("prometheus", Scope.METRICS),
        "admin": make("root", Scope.ADMIN),
    }
    database.close()
    yield GuardedApi(fresh_api, keys)


def _settings(data: Path, database_url: str, root: Path, broker: str) -> Settings:
    return Settings(
        data_dir=data,
        database_url=database_url,
        broker_url=broker,
        model_roots=str(root),
        max_body_bytes=200_000,
        max_upload_bytes=2_000_000,
        rate_failures=0,  # most tests of bad keys send more than anybody should
        janitor_seconds=3600,  # the tests are the only workers: nobody is to be missed
    )
