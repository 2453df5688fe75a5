"""A database with very many merges: a few dozen are made by the records themselves, and multiplied inside the database.

What is multiplied went through the records like any merge, with its plan, artifact and events; each copy has an id and
times of its own. So a million merges with four million events take minutes, and whatever the records write tomorrow is
in them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Table, delete, text

from app.errors import MergeyardError
from app.records.database import Database
from app.records.job import Job, NewJob
from app.records.jobs import Jobs
from app.records.tables import artifacts, events, jobs
from app.records.tally import Tally
from app.records.upkeep import Upkeep

MOMENTS = ("at", "published_at", "created_at", "started_at", "finished_at", "updated_at", "rung_at")

OWNERS = ("anna", "bert", "clara", "local")
METHODS = ("ties", "dare_ties", "linear", "task_arithmetic", "della", "breadcrumbs")
# What finds less than a page must not look at all the others: a method and an owner of a handful of merges, and an
# owner of many who never uses a method of many.
RARE, NEWCOMER = "slerp", "zoe"
CHOOSY, AVOIDED = "clara", "linear"
QUEUES = ("default", "gpu", "night")
TEMPLATES = 120
FEW = 7  # of the rare method, and of the newcomer, whatever the number of all
WAITING, DELETED = 100, 20  # likewise
BLOCK = 50_000  # rows multiplied by one statement

New = Callable[[random.Random], NewJob]


def fill(database: Database, count: int, new: New, done: Callable[[int], None] = lambda _: None) -> None:
    """``count`` merges, as ``new`` makes them, in a database that has none; ``done`` is told how many there are.

    Nine of ten succeeded, the others failed or were cancelled. A few wait, a few are deleted and not swept, and a few
    are rare: as many in a large database as in a small one.
    """
    rng = random.Random(0)

    def one(**changes: Any) -> NewJob:
        owner = rng.choice(OWNERS)
        method = rng.choice([method for method in METHODS if (owner, method) != (CHOOSY, AVOIDED)])
        return replace(new(rng), **{"owner": owner, "method": method, "queue": rng.choice(QUEUES), **changes})

    made = Jobs(database)
    rare = [end(made, one(**changes), "succeeded") for changes in ({"method": RARE}, {"owner": NEWCOMER}) * FEW]
    templates = [
        end(made, one(), {0: "failed", 1: "cancelled"}.get(number % 20, "succeeded")) for number in range(TEMPLATES)
    ]
    _settle(database, [*rare, *templates])
    _multiply(database, templates, count - 2 * FEW - WAITING - DELETED, done)
    for _ in range(DELETED):
        made.delete(end(made, one(), "succeeded").id)
    for _ in range(WAITING):
        made.submit(one())
    if database.dialect == "postgresql":  # what its own upkeep does within a minute, where that is on
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    done(count)


def end(made: Jobs, new: NewJob, ending: str) -> Job:
    """A merge that came to its end as a worker brings it there: ``succeeded``, ``failed`` or ``cancelled``."""
    job, _ = made.submit(new)
    held = made.claim(job.id, lease_seconds=3600, worker="benchmark-1")
    assert held is not None and held.lease_token is not None
    token = held.lease_token
    made.set_stage(job.id, token, "merging")
    if ending == "cancelled":
        made.request_cancel(job.id)
        return made.confirm_cancelled(job.id, token)
    if ending == "failed":
        return made.fail(job.id, token, MergeyardError("source_not_finite", "A tensor has a NaN."), retry=False)
    files = [
        {"name": name, "key": f"{job.id}/{token}/{name}", "size": 123_456, "sha256": letter * 64}
        for name, letter in (("mergeyard.json", "a"), ("config.json", "b"), ("model.safetensors", "c"))
    ]
    summary = {"manifest_sha256": "a" * 64, "manifest_key": files[0]["key"], "size": 370_368}
    return made.publish(job.id, token, {**summary, "files": files})


def _settle(database: Database, ended: Sequence[Job]) -> None:
    """As the janitor leaves what has ended."""
    for job in ended:
        Upkeep(database).set_swept(job.id)
    Tally(database).count()


def _multiply(database: Database, templates: Sequence[Job], copies: int, done: Callable[[int], None]) -> None:
    """``copies`` of the templates, which go."""
    with database.write() as connection:
        indexes = _indexes(connection)
        for name in indexes:  # made again at the end, which is faster than keeping them
            connection.execute(text(f"DROP INDEX {name}"))
        connection.execute(text("CREATE TABLE templates (number INTEGER PRIMARY KEY, id VARCHAR(96) NOT NULL)"))
        numbered = [{"number": number, "id": job.id} for number, job in enumerate(templates)]
        connection.execute(text("INSERT INTO templates (number, id) VALUES (:number, :id)"), numbered)
    for first in range(0, copies, BLOCK):
        number = min(BLOCK, copies - first)
        with database.write() as connection:
            _copy(connection, jobs, "id", first, number, copies)
            _copy(connection, artifacts, "id", first, number, copies)
            _copy(connection, events, "job_id", first, number, copies)
        done(first + number)
    with database.write() as connection:
        for definition in indexes.values():
            connection.execute(text(definition))
        connection.execute(text("DROP TABLE templates"))
        for table in (artifacts, jobs):
            connection.execute(delete(table).where(table.c.id.in_([job.id for job in templates])))


def _indexes(connection: Connection) -> Mapping[str, str]:
    """Those of jobs and events in the order in which the migrations made them, and what makes each."""
    of_sqlite = (
        "SELECT name, sql FROM sqlite_master WHERE tbl_name IN ('jobs', 'events') AND type = 'index' ORDER BY rowid"
    )
    of_postgresql = (
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('jobs', 'events') AND indexname NOT LIKE 'pk_%'"
    )
    found = connection.execute(text(of_sqlite if connection.dialect.name == "sqlite" else of_postgresql))
    return {name: definition for name, definition in found if definition is not None}


def _copy(connection: Connection, table: Table, own: str, first: int, number: int, copies: int) -> None:
    """The rows of ``table`` whose ``own`` column names a template, ``number`` times over: two merges a second, the last
    of all ``copies`` an hour ago.
    """
    if connection.dialect.name == "sqlite":
        numbers = "WITH RECURSIVE numbers (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)"
        moment = "strftime('%Y-%m-%d %H:%M:%f', 'now', (-3600 - (:copies - n) * 0.5) || ' seconds') || '000'"
        number_text = "printf('%010d', n)"
    else:
        numbers = "WITH numbers (n) AS (SELECT generate_series(CAST(:first AS int), CAST(:last AS int)))"
        moment = "now() - make_interval(secs => 3600 + (CAST(:copies AS int) - n) * 0.5)"
        number_text = "lpad(CAST(n AS text), 10, '0')"
    changed = {name: f"'mrg-' || {number_text} || substr(source.{name}, 15)" for name in (own, "artifact_id")}
    changed |= dict.fromkeys(MOMENTS, moment)
    names = [column.name for column in table.columns if table is not events or column.name != "id"]
    statement = (
        f"INSERT INTO {table.name} ({', '.join(names)}) {numbers} "
        f"SELECT {', '.join(changed.get(name, f'source.{name}') for name in names)} FROM numbers "
        f"JOIN templates ON templates.number = n % :templates "
        f"JOIN {table.name} AS source ON source.{own} = templates.id ORDER BY n, source.id"
    )
    values = {"first": first, "last": first + number - 1, "copies": copies, "templates": TEMPLATES}
    connection.execute(text(statement.replace("%H:%M", r"%H\:%M").replace(":%f", r"\:%f")), values)
