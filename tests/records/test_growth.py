"""What is asked again and again costs no more beside many merges that have finished than beside few.

Looked at is what a statement does, not how long it takes: on SQLite the steps of its virtual machine, on PostgreSQL the
rows that its plan visits, with real statistics.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, select

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.audit import Audit
from app.records.database import Database
from app.records.deliveries import Deliveries
from app.records.following import Following, Seen
from app.records.job import Idempotency, Job, Status
from app.records.jobs import Jobs
from app.records.key import LOCAL_OWNER, Caller, Scope
from app.records.keys import Keys
from app.records.owned import OwnedUploads
from app.records.queues import Queues
from app.records.quotas import Limits, Quotas
from app.records.rows import write_cursor
from app.records.sessions import Sessions
from app.records.tables import jobs as table
from app.records.tally import Tally
from app.records.upkeep import Upkeep
from app.records.workers import Workers
from benchmarks import rows
from tests import servers
from tests.records.submitting import ARTIFACT, new_job

FINISHED = 20_000
MOST_STEPS = 40_000  # to look at every entry of an index takes more
MOST_ROWS = 2_000


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Many merges that have finished; a few that wait, run, are of a rare method, or are to be swept."""
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("growth") / "records.sqlite3"
        path.write_bytes(request.getfixturevalue("sqlite_template").read_bytes())
        yield from filled(f"sqlite:///{path}")
        return
    with servers.temporary_database(request.getfixturevalue("postgres_url")) as url:
        yield from filled(url)


def filled(url: str) -> Iterator[Database]:
    made = Database(url)
    made.migrate()
    rows.fill(made, FINISHED, lambda _: new_job())
    yield made
    made.close()


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def deep(database: Database) -> str:
    """A cursor in the middle of the list."""
    with database.read() as connection:
        row = connection.execute(select(table).order_by(table.c.created_at).offset(FINISHED // 2).limit(1)).one()
    return write_cursor(row)


@contextmanager
def watched(database: Database) -> Iterator[dict[str, int]]:
    """What each statement does meanwhile."""
    done: dict[str, int] = {}
    if database.dialect == "sqlite":
        with _counting_steps(database, done):
            yield done
    else:
        with _explaining(database, done):
            yield done


@contextmanager
def _counting_steps(database: Database, done: dict[str, int]) -> Iterator[None]:
    current = ""

    def begin(connection: Connection, cursor: sqlite3.Cursor, statement: str, *_: Any) -> None:
        nonlocal current
        current = statement
        done.setdefault(statement, 0)
        cursor.connection.set_progress_handler(step, 100)

    def step() -> None:
        done[current] += 100

    event.listen(database.engine, "before_cursor_execute", begin)
    try:
        yield
    finally:
        event.remove(database.engine, "before_cursor_execute", begin)


@contextmanager
def _explaining(database: Database, done: dict[str, int]) -> Iterator[None]:
    def explain(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        with cursor.connection.cursor() as other:  # in the same transaction, and undone
            other.execute("SAVEPOINT explained")
            other.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            (found,) = other.fetchone()
            other.execute("ROLLBACK TO explained")
        plan = json.loads(found) if isinstance(found, str) else found
        done[statement] = max(done.get(statement, 0), visited(plan[0]["Plan"]))

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        yield
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)


def visited(plan: Mapping[str, Any]) -> int:
    """Rows that the scans of a plan look at, those included that they throw away."""
    own = 0
    if "Scan" in plan["Node Type"]:
        seen = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        own = int(sum(plan.get(name, 0) for name in seen) * plan["Actual Loops"])
    return own + sum(visited(part) for part in plan.get("Plans", ()))


def too_much(database: Database, done: Mapping[str, int]) -> dict[str, int]:
    assert done, "nothing was asked"
    most = MOST_STEPS if database.dialect == "sqlite" else MOST_ROWS
    return {statement: work for statement, work in done.items() if work > most}


@pytest.mark.parametrize("owner", [None, rows.CHOOSY, rows.NEWCOMER])
@pytest.mark.parametrize("method", [None, rows.AVOIDED, rows.RARE])
@pytest.mark.parametrize(
    "status",
    [None, "succeeded", "failed", "queued", "running", [Status.QUEUED, Status.FAILED], list(Status)],
    ids=lambda status: status if isinstance(status, str) else "any" if status is None else f"{len(status)} statuses",
)
def test_a_page_costs_the_same_whatever_is_asked_for_and_however_deep(
    database: Database, jobs: Jobs, deep: str, status: Any, method: str | None, owner: str | None
) -> None:
    by = None if owner is None else reader(owner)
    with watched(database) as done:
        for cursor in (None, deep):
            jobs.list(status=status, method=method, cursor=cursor, by=by)
    assert not too_much(database, done)


def reader(owner: str) -> Caller:
    return Caller(owner=owner, scopes=frozenset({Scope.READ}))


def held(jobs: Jobs, **changes: Any) -> Job:
    job, _ = jobs.submit(new_job(**changes))
    running = jobs.claim(job.id, lease_seconds=60)
    assert running is not None
    return running


def submitting(jobs: Jobs) -> None:
    key = Idempotency(owner="anna", key="key", request_hash="0" * 64)
    by = reader("anna")
    new = new_job(owner="anna", reuse_key="a" * 64)
    job, _ = jobs.submit(new, idempotency=key, by=by)
    jobs.reusable(new)
    jobs.earlier(key)
    jobs.get(job.id, by=by)
    jobs.events(job.id, by=by)
    jobs.request_cancel(job.id, by=by)
    jobs.delete(job.id, by=by)


def working(jobs: Jobs) -> None:
    first, second, third = (held(jobs) for _ in range(3))
    for job in (first, second, third):
        jobs.heartbeat(job.id, job.lease_token or "", lease_seconds=60, progress_bytes=1)
        jobs.set_stage(job.id, job.lease_token or "", "merging")
        file = StoredFile(name="a", key=f"{job.id}/a", size=1, sha256="0" * 64)
        jobs.record_shard(job.id, job.lease_token or "", file, {})
        jobs.shards(job.id)
    jobs.publish(first.id, first.lease_token or "", ARTIFACT)
    jobs.fail(second.id, second.lease_token or "", MergeyardError("internal", "x"), retry=True)
    jobs.hand_back(third.id, third.lease_token or "")
    for job in (second, third):
        jobs.request_cancel(job.id)


def tidying(jobs: Jobs) -> None:
    """A round of the janitor, and what a deaf worker asks."""
    dead = jobs.claim(jobs.submit(new_job())[0].id, lease_seconds=0)
    upkeep = Upkeep(jobs.database)
    upkeep.round(ring_after=0)
    upkeep.round()
    upkeep.waiting("default")
    upkeep.expire()
    unswept = upkeep.unswept()
    assert unswept and dead is not None
    upkeep.unswept(after=unswept[0])
    for job in unswept[:3]:
        upkeep.claims(job.id)
        upkeep.set_swept(job.id)
    jobs.request_cancel(dead.id)


def counting(jobs: Jobs) -> None:
    tally = Tally(jobs.database)
    tally.count()
    tally.load()
    tally.totals()
    Deliveries(jobs.database).pending()


def looking(jobs: Jobs) -> None:
    """Who works on what, what waits where, and a listener's look at what is new."""
    job = held(jobs, owner="anna")
    for by in (None, reader("anna")):
        Queues(jobs.database).list(by=by)
        Workers(jobs.database).list(by=by)
    watched_jobs = {one.id: Seen(version=0, event=0) for one in jobs.list(by=reader("anna")).jobs}
    Following(jobs.database).look(watched_jobs)
    jobs.hand_back(job.id, job.lease_token or "")
    jobs.request_cancel(job.id)


def limiting(jobs: Jobs) -> None:
    limits = Limits(owner_bytes=1 << 50, owner_jobs=1 << 20, store_bytes=1 << 50, free=lambda: 1 << 50)
    job, _ = jobs.submit(new_job(owner="anna"), limits=limits)
    held = jobs.claim(job.id, lease_seconds=60, free=lambda: 1 << 50)
    assert held is not None
    Quotas(jobs.database).of_owner("anna")
    Quotas(jobs.database).of_all()
    jobs.hand_back(job.id, held.lease_token or "")
    jobs.request_cancel(job.id)


def authenticating(jobs: Jobs) -> None:
    keys, sessions = Keys(jobs.database), Sessions(jobs.database)
    made = keys.create(owner="anna", scopes={Scope.READ}, by=Caller(owner=LOCAL_OWNER))
    keys.exist()
    keys.authenticate(made.text)
    caller = Caller(owner="anna", key_id=made.key.id)
    session = sessions.open(timedelta(hours=1), by=caller)
    sessions.authenticate(session.text)
    sessions.close(session, by=caller)
    Audit(jobs.database).list(owner="anna")
    OwnedUploads(jobs.database).has("anna", "0" * 64)
    OwnedUploads(jobs.database).of("anna")


@pytest.mark.parametrize(
    "asking", [submitting, working, tidying, counting, looking, limiting, authenticating], ids=lambda ask: ask.__name__
)
def test_no_statement_grows_with_what_has_finished(
    database: Database, jobs: Jobs, asking: Callable[[Jobs], None]
) -> None:
    with watched(database) as done:
        asking(jobs)
    assert not too_much(database, done)
