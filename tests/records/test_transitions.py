"""Every rule of the state machine, on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.database import Database, clock
from app.records.job import CancelRequested, Job, LeaseLost, NewJob, Stage, Status
from app.records.jobs import Jobs
from app.records.tables import events
from app.records.tables import jobs as table
from app.records.upkeep import Upkeep
from tests.records.submitting import ARTIFACT, claimed, new_job

BROKEN = MergeyardError("disk_full", "The disk is full.")


def kinds(jobs: Jobs, job: Job) -> list[str]:
    return [event.type for event in jobs.events(job.id)]


def test_a_submitted_job_is_queued_and_reads_back_as_it_was_given(jobs: Jobs) -> None:
    new = new_job(labels={"team": "é"}, recipe={"b": 1, "a": [1.5, None]}, warnings=({"code": "x"},), priority=3)
    job, created = jobs.submit(new)
    assert created and job == jobs.get(job.id)
    assert (job.status, job.version, job.attempt, job.stage, job.lease_token) == (Status.QUEUED, 1, 0, None, None)
    assert (job.recipe, job.labels, job.warnings, job.priority) == (new.recipe, new.labels, new.warnings, 3)
    assert list(job.recipe) == ["b", "a"], "the recipe keeps its order"
    assert job.created_at.utcoffset() is not None and abs((jobs.database.now() - job.created_at).total_seconds()) < 60
    assert kinds(jobs, job) == ["submitted"]


def test_an_unknown_id_is_not_found(jobs: Jobs) -> None:
    for read in (jobs.get, jobs.events, jobs.request_cancel, jobs.delete):
        with pytest.raises(MergeyardError) as caught:
            read("mrg-nothing")
        assert caught.value.code == "not_found"


def test_a_claim_gives_an_attempt_a_token_and_a_lease_by_the_databases_clock(jobs: Jobs) -> None:
    job = claimed(jobs, lease_seconds=60)
    assert (job.status, job.stage, job.attempt, job.version) == (Status.RUNNING, Stage.RESOLVING, 1, 2)
    assert job.lease_token and job.lease_expires_at and job.started_at
    assert 55 < (job.lease_expires_at - jobs.database.now()).total_seconds() <= 60
    assert kinds(jobs, job) == ["submitted", "claimed"]


def test_of_many_claimants_exactly_one_wins(database: Database) -> None:
    jobs = Jobs(database)
    for _ in range(5):
        job, _ = jobs.submit(new_job())
        start, won = threading.Barrier(8), []

        def claim(job: Job = job, start: threading.Barrier = start, won: list[Any] = won) -> None:
            start.wait()
            if (mine := jobs.claim(job.id, lease_seconds=60)) is not None:
                won.append(mine)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert jobs.get(job.id).attempt == 1
        assert kinds(jobs, job) == ["submitted", "claimed"]


def test_a_running_job_is_claimed_again_only_after_its_lease_ran_out_and_while_attempts_remain(jobs: Jobs) -> None:
    job = claimed(jobs, lease_seconds=60, max_attempts=2)
    assert jobs.claim(job.id, lease_seconds=60) is None
    jobs.heartbeat(job.id, token(job), lease_seconds=0.01)
    time.sleep(0.05)
    again = jobs.claim(job.id, lease_seconds=0.01)
    assert again is not None and again.attempt == 2 and again.lease_token != job.lease_token
    assert again.started_at == job.started_at, "the job started with its first attempt"
    assert kinds(jobs, job) == ["submitted", "claimed", "worker_lost", "claimed"]
    time.sleep(0.05)
    assert jobs.claim(job.id, lease_seconds=60) is None, "no attempt is left"
    assert jobs.get(job.id).status is Status.FAILED, "so the claim ends it, as the janitor would"


def test_a_job_taken_from_a_dead_worker_waits_for_its_pause_whoever_takes_it(database: Database) -> None:
    jobs = Jobs(database, retry_seconds=60)
    job = claimed(jobs, lease_seconds=0.01)
    time.sleep(0.05)
    assert jobs.claim(job.id, lease_seconds=60) is None
    waiting = jobs.get(job.id)
    assert (waiting.status, waiting.attempt, len(waiting.failures)) == (Status.QUEUED, 1, 1)
    assert waiting.retry_at is not None
    assert kinds(jobs, job) == ["submitted", "claimed", "worker_lost"]


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "cancelling"])
def test_what_is_not_free_is_not_claimed(jobs: Jobs, status: str) -> None:
    job = in_status(jobs, status)
    assert jobs.claim(job.id, lease_seconds=60) is None
    assert jobs.get(job.id) == job


def test_a_heartbeat_prolongs_the_lease_and_writes_progress(jobs: Jobs) -> None:
    job = claimed(jobs, lease_seconds=5)
    beat = jobs.heartbeat(job.id, token(job), lease_seconds=100, progress_bytes=40, total_bytes=90)
    now = jobs.get(job.id)
    assert not beat.cancel_requested
    assert now.lease_expires_at and job.lease_expires_at and now.lease_expires_at > job.lease_expires_at
    assert (now.progress_bytes, now.total_bytes, now.version) == (40, 90, job.version + 1)
    jobs.heartbeat(job.id, token(job), lease_seconds=100, progress_bytes=40)
    assert jobs.get(job.id).progress_at == now.progress_at, "the same progress is no progress"


def test_a_heartbeat_brings_back_a_cancel_request(jobs: Jobs) -> None:
    job = claimed(jobs)
    jobs.request_cancel(job.id)
    assert jobs.heartbeat(job.id, token(job), lease_seconds=60).cancel_requested


def test_entering_a_stage_leaves_one_event(jobs: Jobs) -> None:
    job = claimed(jobs)
    jobs.set_stage(job.id, token(job), "merging")
    jobs.set_stage(job.id, token(job), Stage.MERGING)
    assert jobs.get(job.id).stage is Stage.MERGING
    assert kinds(jobs, job) == ["submitted", "claimed", "stage"]


def test_a_retrys_shard_replaces_the_earlier_one(jobs: Jobs) -> None:
    job = claimed(jobs)
    first = StoredFile(name="a.safetensors", key=f"{job.id}/one/a.safetensors", size=3, sha256="0" * 64)
    second = StoredFile(name="a.safetensors", key=f"{job.id}/two/a.safetensors", size=4, sha256="1" * 64)
    jobs.record_shard(job.id, token(job), first, {"t": {"norm": 0.1}})
    jobs.record_shard(job.id, token(job), second, {})
    assert [(shard.file, shard.statistics) for shard in jobs.shards(job.id)] == [(second, {})]
    assert jobs.events(job.id)[-1].data == {"name": "a.safetensors", "size": 4, "sha256": "1" * 64}


def test_publishing_is_one_write_under_the_token(jobs: Jobs) -> None:
    job = claimed(jobs, expires_in=3600)
    done = jobs.publish(job.id, token(job), ARTIFACT)
    assert (done.status, done.artifact, done.stage, done.lease_token) == (Status.SUCCEEDED, ARTIFACT, None, None)
    assert done.finished_at and done.expires_at and done.progress_bytes == done.total_bytes
    assert 3590 < (done.expires_at - done.finished_at).total_seconds() < 3610
    assert kinds(jobs, job)[-1] == "succeeded"
    with pytest.raises(LeaseLost):
        jobs.publish(job.id, token(job), ARTIFACT)


def test_a_failure_with_attempts_left_goes_back_to_the_queue_with_its_reason(jobs: Jobs) -> None:
    job = claimed(jobs, max_attempts=2)
    back = jobs.fail(job.id, token(job), BROKEN, retry=True)
    assert (back.status, back.attempt, back.error, back.finished_at) == (Status.QUEUED, 1, None, None)
    event = jobs.events(job.id)[-1]
    assert event.type == "retried" and event.data["error"]["code"] == "disk_full"
    again = jobs.claim(job.id, lease_seconds=60)
    assert again is not None
    failed = jobs.fail(job.id, token(again), BROKEN, retry=True)
    assert failed.status is Status.FAILED and failed.finished_at
    assert failed.error == {
        "code": "disk_full",
        "title": "There is not enough disk space",
        "message": "The disk is full.",
        "where": "",
        "fault": "system",
        "problems": [{"code": "disk_full", "message": "The disk is full.", "where": ""}],
    }


def test_the_reason_of_each_attempt_is_kept_until_none_is_left(jobs: Jobs) -> None:
    """One failed, one was handed back, one was lost to another claim, one to the janitor: the job stops."""
    upkeep = Upkeep(jobs.database)
    job = claimed(jobs, max_attempts=3)
    jobs.fail(job.id, token(job), BROKEN, retry=True)
    jobs.hand_back(job.id, token(again(jobs, job, 60)))
    again(jobs, job, 0.01)
    time.sleep(0.05)
    again(jobs, job, 0.01)
    time.sleep(0.05)
    assert upkeep.round().failed == (job.id,)
    failed = jobs.get(job.id)
    assert [(failure["attempt"], failure["code"]) for failure in failed.failures] == [
        (1, "disk_full"),
        (2, "worker_lost"),
        (3, "worker_lost"),
    ]
    assert failed.failures[0]["message"] == "The disk is full."
    assert jobs.claim(job.id, lease_seconds=60) is None


def again(jobs: Jobs, job: Job, lease_seconds: float) -> Job:
    running = jobs.claim(job.id, lease_seconds=lease_seconds)
    assert running is not None
    return running


def test_each_retry_waits_twice_as_long_as_the_one_before(database: Database) -> None:
    jobs, pauses = Jobs(database, retry_seconds=2.0), []
    job, _ = jobs.submit(new_job(max_attempts=20))
    for _ in range(10):
        with database.write() as connection:
            connection.execute(update(table).values(retry_at=None))
        failed = jobs.fail(job.id, token(again(jobs, job, 60)), BROKEN, retry=True)
        assert failed.retry_at is not None
        pauses.append(round((failed.retry_at - failed.updated_at).total_seconds()))
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_nobody_claims_or_rings_for_a_job_before_its_pause_is_over(database: Database) -> None:
    jobs, upkeep = Jobs(database, retry_seconds=60), Upkeep(database, retry_seconds=60)
    failed, lost = claimed(jobs), claimed(jobs, lease_seconds=0.01)
    jobs.fail(failed.id, token(failed), BROKEN, retry=True)
    time.sleep(0.05)
    assert upkeep.round(ring_after=0).ring == ()
    assert [jobs.claim(job.id, lease_seconds=60) for job in (failed, lost)] == [None, None]
    assert upkeep.waiting("default") == 0
    with database.write() as connection:
        now = clock(connection)
        connection.execute(update(table).values(retry_at=now, rung_at=now - timedelta(seconds=30)))
    assert {ring.id for ring in upkeep.round(ring_after=60).ring} == {failed.id, lost.id}
    assert upkeep.round(ring_after=60).ring == (), "one ring for each"
    assert again(jobs, failed, 60).retry_at is None


def test_a_clock_that_was_set_back_keeps_no_job_waiting(jobs: Jobs, database: Database) -> None:
    job = claimed(jobs)
    jobs.fail(job.id, token(job), BROKEN, retry=True)
    with database.write() as connection:
        connection.execute(update(table).values(retry_at=database.now() + timedelta(hours=1)))
    assert again(jobs, job, 60).attempt == 2


def test_a_failure_that_a_retry_cannot_mend_is_final_at_once(jobs: Jobs) -> None:
    job = claimed(jobs, max_attempts=3)
    assert jobs.fail(job.id, token(job), MergeyardError("source_changed", "x"), retry=False).status is Status.FAILED


def test_handing_back_costs_no_attempt(jobs: Jobs) -> None:
    job = claimed(jobs, max_attempts=1)
    back = jobs.hand_back(job.id, token(job))
    assert (back.status, back.attempt, back.lease_token) == (Status.QUEUED, 0, None)
    again = jobs.claim(job.id, lease_seconds=60)
    assert again is not None and again.attempt == 1 and again.lease_token != job.lease_token
    assert kinds(jobs, job) == ["submitted", "claimed", "handed_back", "claimed"]


def test_cancelling_a_queued_job_ends_it_at_once(jobs: Jobs) -> None:
    job, _ = jobs.submit(new_job())
    cancelled = jobs.request_cancel(job.id)
    assert cancelled.status is Status.CANCELLED and cancelled.finished_at
    assert jobs.request_cancel(job.id) == cancelled, "asking again changes nothing"
    assert kinds(jobs, job) == ["submitted", "cancel_requested", "cancelled"]


def test_cancelling_a_running_job_waits_for_its_worker(jobs: Jobs) -> None:
    job = claimed(jobs)
    assert jobs.request_cancel(job.id).status is Status.CANCELLING
    assert jobs.request_cancel(job.id).status is Status.CANCELLING
    with pytest.raises(CancelRequested):
        jobs.publish(job.id, token(job), ARTIFACT)
    assert jobs.confirm_cancelled(job.id, token(job)).status is Status.CANCELLED
    assert kinds(jobs, job) == ["submitted", "claimed", "cancel_requested", "cancelled"]


@pytest.mark.parametrize("end", ["fail", "hand_back"])
def test_whatever_ends_a_cancelling_job_cancels_it(jobs: Jobs, end: str) -> None:
    job = in_status(jobs, "cancelling")
    ended = jobs.hand_back(job.id, token(job)) if end == "hand_back" else _fail(jobs, job)
    assert ended.status is Status.CANCELLED and ended.error is None


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_what_is_finished_cannot_be_cancelled(jobs: Jobs, status: str) -> None:
    job = in_status(jobs, status)
    with pytest.raises(MergeyardError) as caught:
        jobs.request_cancel(job.id)
    assert caught.value.code == "conflict" and status in caught.value.message
    assert jobs.get(job.id) == job


@pytest.mark.parametrize("status", ["queued", "running", "cancelling"])
def test_what_is_not_finished_cannot_be_deleted(jobs: Jobs, status: str) -> None:
    job = in_status(jobs, status)
    with pytest.raises(MergeyardError) as caught:
        jobs.delete(job.id)
    assert caught.value.code == "conflict"


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_a_deleted_job_is_gone_for_everybody(jobs: Jobs, status: str) -> None:
    job = in_status(jobs, status)
    jobs.delete(job.id)
    for read in (jobs.get, jobs.events, jobs.request_cancel, jobs.delete):
        with pytest.raises(MergeyardError) as caught:
            read(job.id)
        assert caught.value.code == "not_found"
    assert jobs.list().jobs == ()


def _fail(jobs: Jobs, job: Job) -> Job:
    return jobs.fail(job.id, token(job), BROKEN, retry=True)


WRITES: dict[str, Callable[[Jobs, str, str], Any]] = {
    "heartbeat": lambda jobs, id, token: jobs.heartbeat(id, token, lease_seconds=60, progress_bytes=9),
    "set_stage": lambda jobs, id, token: jobs.set_stage(id, token, "merging"),
    "record_shard": lambda jobs, id, token: jobs.record_shard(
        id, token, StoredFile(name="a", key="k", size=1, sha256="0" * 64), {}
    ),
    "publish": lambda jobs, id, token: jobs.publish(id, token, ARTIFACT),
    "fail": lambda jobs, id, token: jobs.fail(id, token, BROKEN, retry=True),
    "hand_back": lambda jobs, id, token: jobs.hand_back(id, token),
    "confirm_cancelled": lambda jobs, id, token: jobs.confirm_cancelled(id, token),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_token_writes_nothing(jobs: Jobs, database: Database, write: str) -> None:
    stale = claimed(jobs)
    jobs.hand_back(stale.id, token(stale))
    jobs.claim(stale.id, lease_seconds=60)
    before = everything(database)
    with pytest.raises(LeaseLost):
        WRITES[write](jobs, stale.id, token(stale))
    assert everything(database) == before and jobs.shards(stale.id) == []


@pytest.mark.parametrize("write", WRITES)
def test_every_write_under_a_token_grows_the_version(jobs: Jobs, write: str) -> None:
    job = in_status(jobs, "cancelling" if write == "confirm_cancelled" else "running")
    WRITES[write](jobs, job.id, token(job))
    assert jobs.get(job.id).version == job.version + 1


def test_a_rule_that_is_asked_out_of_turn_is_a_bug(jobs: Jobs) -> None:
    job = claimed(jobs)
    with pytest.raises(ValueError, match="nobody asked"):
        jobs.confirm_cancelled(job.id, token(job))


def in_status(jobs: Jobs, status: str, **changes: Any) -> Job:
    """A job brought to ``status`` by the transitions that lead there."""
    new: NewJob = new_job(**changes)
    job, _ = jobs.submit(new)
    if status == "queued":
        return job
    running = jobs.claim(job.id, lease_seconds=60)
    assert running is not None
    match status:
        case "succeeded":
            return jobs.publish(job.id, token(running), ARTIFACT)
        case "failed":
            return jobs.fail(job.id, token(running), BROKEN, retry=False)
        case "cancelling":
            return jobs.request_cancel(job.id)
        case "cancelled":
            jobs.request_cancel(job.id)
            return jobs.confirm_cancelled(job.id, token(running))
    return running


def token(job: Job) -> str:
    assert job.lease_token is not None
    return job.lease_token


def everything(database: Database) -> list[Any]:
    with database.read() as connection:
        rows = [tuple(row) for row in connection.execute(select(table))]
        return [*rows, connection.execute(select(func.count()).select_from(events)).scalar_one()]
