"""Every migration up, down and up again over rows of every table, on both databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, Integer, MetaData, insert, select

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.aliases import Aliases
from app.records.database import Database, migrations_config
from app.records.job import Idempotency, Kind, NewPoint
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.tables import UtcTime, metadata
from app.records.upkeep import Upkeep
from tests import servers
from tests.records.submitting import ARTIFACT, new_job


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """One without a schema."""
    if request.param == "sqlite":
        found = Database(f"sqlite:///{tmp_path}/empty.sqlite3")
        yield found
        found.close()
        return
    with servers.temporary_database(request.getfixturevalue("postgres_url")) as url:
        found = Database(url)
        yield found
        found.close()


def up(database: Database, revision: str = "head") -> None:
    _migrate(database, command.upgrade, revision)


def down(database: Database, revision: str) -> None:
    _migrate(database, command.downgrade, revision)


def _migrate(database: Database, step: Callable[[Config, str], None], revision: str) -> None:
    config = migrations_config()
    with database.write() as connection:
        config.attributes["connection"] = connection
        step(config, revision)


def fill(database: Database) -> None:
    """Jobs in every state with their events, shards and keys, and one row in every table that jobs do not fill."""
    jobs = Jobs(database)
    webhook = {"url": "https://hooks.example.com/", "events": ["succeeded"]}
    for end in ("queued", "running", "cancelling", "succeeded", "failed", "cancelled"):
        key = Idempotency(owner="me", key=end, request_hash="1" * 64)
        job, _ = jobs.submit(new_job(labels={"é": "ü"}, max_attempts=1, webhook=webhook), idempotency=key)
        if end == "queued":
            continue
        running = jobs.claim(job.id, lease_seconds=60)
        assert running is not None and running.lease_token is not None
        file = StoredFile(name="a", key=f"{job.id}/a", size=1, sha256="0" * 64)
        jobs.record_shard(job.id, running.lease_token, file, {"t": {"norm": 0.1}})
        if end in ("cancelling", "cancelled"):
            jobs.request_cancel(job.id)
        if end == "cancelled":
            jobs.confirm_cancelled(job.id, running.lease_token)
        if end == "succeeded":
            jobs.publish(job.id, running.lease_token, ARTIFACT)
            Aliases(database).point("production", job.id, by=Caller(owner=job.owner))
            jobs.submit(new_job(merges=[job.id]))
        if end == "failed":
            jobs.fail(job.id, running.lease_token, MergeyardError("internal", "x"), retry=True)
    jobs.submit(new_job(points=[POINT]))
    with database.write() as connection:
        for table in metadata.sorted_tables:
            if connection.execute(select(table).limit(1)).first() is None:
                values = {column.name: sample(database, column) for column in table.columns if not column.nullable}
                connection.execute(insert(table).values(values))


POINT = NewPoint(name="base", settings=None, recipe={}, resolved={}, plan_digest="d" * 64)


def sample(database: Database, column: Column[Any]) -> Any:
    """A value of the column's type; "x" for every text, so that foreign keys lead to the row of the other table."""
    if isinstance(column.type, JSON):
        return []
    if isinstance(column.type, UtcTime):
        return database.now()
    return 1 if isinstance(column.type, Integer) else "x"


def rows(database: Database, tables: MetaData) -> dict[str, list[Any]]:
    with database.read() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(select(table)).all())) for table in tables.sorted_tables
        }


def tables_of(database: Database) -> MetaData:
    """The tables and columns that there are."""
    found = MetaData()
    with database.read() as connection:
        found.reflect(connection)
    found.remove(found.tables["alembic_version"])
    return found


def revisions() -> list[str]:
    """All but the newest, oldest first."""
    scripts = ScriptDirectory.from_config(migrations_config()).walk_revisions()
    return [script.revision for script in scripts][:0:-1]


@pytest.mark.parametrize("revision", revisions())
def test_down_and_up_again_keeps_every_row_and_column_that_both_know(database: Database, revision: str) -> None:
    up(database, revision)
    older = tables_of(database)
    up(database)
    fill(database)
    before = rows(database, older)
    assert all(before.values()), "every table holds something"
    down(database, revision)
    assert rows(database, older) == before
    up(database)
    assert rows(database, older) == before
    database.check()
    jobs = Jobs(database)
    queued = next(job for job in jobs.list().jobs if job.status == "queued")
    assert jobs.claim(queued.id, lease_seconds=60) is not None, "and the service goes on with them"
    (succeeded,) = jobs.list(status="succeeded").jobs
    assert succeeded.artifact_id == succeeded.id and Upkeep(database).claims(succeeded.id).keys  # type: ignore[union-attr]
    (made,) = rows(database, metadata)["artifacts"]
    assert succeeded.id in made, "what is published has one reference"


def test_a_version_that_knows_merges_alone_finds_nothing_else(database: Database) -> None:
    up(database)
    fill(database)
    merges = {job.id for job in Jobs(database).list(limit=200).jobs}
    sweep, _ = Jobs(database).submit(new_job(kind=Kind.SWEEP, points=[POINT], merges=[min(merges)]))
    down(database, "0012")
    with database.read() as connection:
        found = tables_of(database).tables
        assert set(connection.scalars(select(found["jobs"].c.id))) == merges
        assert sweep.id not in set(connection.scalars(select(found["events"].c.job_id)))


def test_all_the_way_down_leaves_nothing_and_up_again_makes_it_anew(database: Database) -> None:
    up(database)
    fill(database)
    down(database, "base")
    assert list(tables_of(database).tables) == []
    up(database)
    database.check()
