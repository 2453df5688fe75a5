"""The outbox, on both databases: written with the end of a merge, sent at least once, given up in the end."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from app.errors import MergeyardError
from app.records import rows as job_rows
from app.records import tables
from app.records.database import Database
from app.records.deliveries import PAUSES, TAKEN_SECONDS, Deliveries, Pending
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.outbox import DeliveryState
from app.records.tables import deliveries as rows
from app.records.upkeep import Upkeep
from tests.records.submitting import ARTIFACT, claimed, new_job

ALL = {"url": "https://hooks.example.com/", "events": ["succeeded", "failed", "cancelled"]}


@pytest.fixture
def deliveries(database: Database) -> Deliveries:
    return Deliveries(database)


def ended(jobs: Jobs, how: str, **changes: object) -> Job:
    """A job that came to an end, with a webhook unless told."""
    running = claimed(jobs, max_attempts=1, **({"webhook": ALL} | changes))
    token = running.lease_token or ""
    match how:
        case "succeeded":
            return jobs.publish(running.id, token, ARTIFACT)
        case "failed":
            return jobs.fail(running.id, token, MergeyardError("internal", "x"), retry=True)
        case _:
            jobs.request_cancel(running.id)
            return jobs.confirm_cancelled(running.id, token)


def later(database: Database, seconds: float) -> None:
    """Time passes, as far as what is to be sent is concerned."""
    with database.write() as connection:
        for row in connection.execute(rows.select().where(rows.c.next_at.is_not(None))):
            moved = row.next_at - timedelta(seconds=seconds)
            connection.execute(update(rows).where(rows.c.id == row.id).values(next_at=moved))


@pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled"])
def test_every_end_is_told_to_those_who_want_it(jobs: Jobs, deliveries: Deliveries, how: str) -> None:
    job = ended(jobs, how)
    for deaf in ([other for other in ALL["events"] if other != how], None):
        ended(jobs, how, webhook=None if deaf is None else {"url": "https://x/", "events": deaf})
    (found,) = deliveries.take(10)
    assert (found.job_id, found.type, found.url, found.state) == (job.id, f"merge.{how}", ALL["url"], "pending")
    told = json.loads(found.body)
    assert (told["type"], told["data"]["id"], told["data"]["status"]) == (f"merge.{how}", job.id, how)
    assert (told["data"]["error"] is None) == (how != "failed")
    assert (told["data"]["artifact"] is None) == (how != "succeeded")


def test_a_queued_job_that_is_cancelled_and_one_whose_worker_died_are_told_too(
    jobs: Jobs, database: Database, deliveries: Deliveries
) -> None:
    queued, _ = jobs.submit(new_job(webhook=ALL))
    jobs.request_cancel(queued.id)
    lost = claimed(jobs, lease_seconds=-1, max_attempts=1, webhook=ALL)
    assert Upkeep(database).round().failed == (lost.id,)
    assert {(one.job_id, one.type) for one in deliveries.take(10)} == {
        (queued.id, "merge.cancelled"),
        (lost.id, "merge.failed"),
    }


def test_what_is_retried_has_not_ended(jobs: Jobs, deliveries: Deliveries) -> None:
    running = claimed(jobs, max_attempts=2, webhook=ALL)
    jobs.fail(running.id, running.lease_token or "", MergeyardError("internal", "x"), retry=True)
    assert deliveries.take(10) == []


def test_it_is_written_with_the_end_or_not_at_all(
    jobs: Jobs, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = claimed(jobs, webhook=ALL)

    def die(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(job_rows, "enqueue", die)
    with pytest.raises(RuntimeError):
        jobs.publish(running.id, running.lease_token or "", ARTIFACT)
    monkeypatch.undo()
    assert jobs.get(running.id).status == "running" and deliveries.of(running.id) == []
    jobs.publish(running.id, running.lease_token or "", ARTIFACT)
    assert len(deliveries.of(running.id)) == 1


def test_what_one_took_no_other_gets_until_it_is_overdue(
    jobs: Jobs, database: Database, deliveries: Deliveries
) -> None:
    ended(jobs, "succeeded")
    (first,) = deliveries.take(10)
    other = Deliveries(Database(str(database.engine.url.render_as_string(hide_password=False))))
    assert other.take(10) == []
    later(database, TAKEN_SECONDS + 1)
    assert [one.id for one in other.take(10)] == [first.id], "its taker died: at least once, under one id"
    other.database.close()


def test_pauses_grow_until_it_is_given_up_after_most_of_a_day(
    jobs: Jobs, database: Database, deliveries: Deliveries
) -> None:
    job = ended(jobs, "succeeded")
    for number, pause in enumerate((*PAUSES, None), start=1):
        (taken,) = deliveries.take(1)
        noted = deliveries.note(taken.id, status=500, error="answered 500")
        assert noted is not None and len(noted.attempts) == number
        if pause is None:
            break
        assert noted.next_at is not None
        wait = (noted.next_at - noted.attempts[-1].at).total_seconds()
        assert wait == pytest.approx(pause) and deliveries.take(1) == []
        later(database, pause + 1)
    assert (noted.state, noted.next_at) == (DeliveryState.FAILED, None)
    assert 20 * 3600 < sum(PAUSES) < 24 * 3600
    (shown,) = deliveries.of(job.id)
    assert [attempt.status for attempt in shown.attempts] == [500] * (len(PAUSES) + 1)


@pytest.mark.parametrize(
    ("status", "state"), [(200, "delivered"), (204, "delivered"), (410, "failed"), (302, "pending"), (None, "pending")]
)
def test_an_answer_decides(jobs: Jobs, deliveries: Deliveries, status: int | None, state: str) -> None:
    ended(jobs, "succeeded")
    (taken,) = deliveries.take(1)
    noted = deliveries.note(taken.id, status=status, error=None)
    assert noted is not None and noted.state == state
    assert (noted.next_at is None) == (state != "pending") == (noted.finished_at is not None)


def test_what_is_pending_is_neither_delivered_nor_given_up(jobs: Jobs, deliveries: Deliveries) -> None:
    assert deliveries.pending() == Pending(count=0, oldest_seconds=0.0)
    for _ in range(4):
        ended(jobs, "succeeded")
    statuses = (200, 410, 500)
    taken = deliveries.take(3)
    for one, status in zip(taken, statuses, strict=True):
        deliveries.note(one.id, status=status, error=None)
    old = jobs.database.now() - timedelta(hours=2)
    with jobs.database.write() as connection:
        connection.execute(update(rows).where(rows.c.id == taken[0].id).values(created_at=old))
    found = deliveries.pending()
    assert found.count == 2 and found.oldest_seconds < 60, "what was delivered long ago is of no concern"
    with jobs.database.write() as connection:
        connection.execute(update(rows).values(created_at=old))
    assert 7200 <= deliveries.pending().oldest_seconds < 7300


def test_others_deliveries_are_not_found_and_go_with_their_merge(
    jobs: Jobs, database: Database, deliveries: Deliveries
) -> None:
    job = ended(jobs, "succeeded", owner="alice")
    with pytest.raises(MergeyardError, match="no merge"):
        deliveries.of(job.id, by=Caller(owner="bob", scopes=frozenset()))
    (taken,) = deliveries.take(1)
    with database.write() as connection:
        connection.execute(tables.artifacts.delete())
        connection.execute(tables.jobs.delete().where(tables.jobs.c.id == job.id))
    assert deliveries.note(taken.id, status=200, error=None) is None
