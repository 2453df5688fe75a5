"""What is counted of jobs, on both databases: all that happened, once, at a cost that does not grow with history."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from sqlalchemy import insert, text

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records import tally as counting
from app.records.database import Database
from app.records.jobs import Jobs
from app.records.tables import events
from app.records.tally import BOUND_NAMES, Happened, Tally, increments, uncounted
from app.records.upkeep import Upkeep
from tests.records.submitting import ARTIFACT, claimed, new_job

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def tally(database: Database) -> Tally:
    return Tally(database)


def token_of(jobs: Jobs, job_id: str) -> str:
    return jobs.get(job_id).lease_token or ""


def everything(jobs: Jobs) -> None:
    """Each thing that is counted, in numbers that differ."""
    for number in range(3):
        job = claimed(jobs)
        file = StoredFile(name="a", key=f"{job.id}/a", size=40 + number, sha256="0" * 64)
        jobs.set_stage(job.id, token_of(jobs, job.id), "merging")
        jobs.record_shard(job.id, token_of(jobs, job.id), file, {})
        jobs.publish(job.id, token_of(jobs, job.id), ARTIFACT)
    for code in ("source_not_finite", "source_not_finite", "lora_cannot_hold"):
        job = claimed(jobs)
        jobs.fail(job.id, token_of(jobs, job.id), MergeyardError(code, "no"), retry=False)
    retried = claimed(jobs)
    jobs.fail(retried.id, token_of(jobs, retried.id), MergeyardError("out_of_memory", "no"), retry=True)
    handed_back = claimed(jobs)
    jobs.hand_back(handed_back.id, token_of(jobs, handed_back.id))
    jobs.request_cancel(handed_back.id)
    claimed(jobs, lease_seconds=0.01)
    time.sleep(0.05)
    Upkeep(jobs.database).round()


def test_everything_that_happened_is_counted(jobs: Jobs, tally: Tally) -> None:
    everything(jobs)
    assert tally.totals().counts == {}
    tally.count()
    assert tally.totals().counts == {
        "submitted": {"": 9},
        "claimed": {"": 9},
        "finished": {"succeeded": 3, "failed": 3, "cancelled": 1},
        "failed": {"source_not_finite": 2, "lora_cannot_hold": 1},
        "retried": {"out_of_memory": 1},
        "handed_back": {"": 1},
        "lost": {"lease_expired": 1},
        "written_bytes": {"": 40 + 41 + 42},
        "published_bytes": {"": 3 * 7},
    }


def test_a_job_that_fails_with_its_last_worker_counts_as_lost_and_as_failed(jobs: Jobs, tally: Tally) -> None:
    claimed(jobs, lease_seconds=0.01, max_attempts=1)
    time.sleep(0.05)
    Upkeep(jobs.database).round()
    tally.count()
    counts = tally.totals().counts
    assert (counts["lost"], counts["failed"]) == ({"lease_expired": 1}, {"worker_lost": 1})


def test_nothing_is_counted_twice_whoever_counts(
    jobs: Jobs, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BATCH", 7)
    everything(jobs)
    threads = [threading.Thread(target=Tally(database).count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Tally(database).count()
    assert Tally(database).count() == 0
    assert Tally(database).totals().counts["submitted"] == {"": 9}
    assert Tally(database).totals().counts["written_bytes"] == {"": 123}


def test_totals_outlive_the_jobs_that_they_count(jobs: Jobs, tally: Tally) -> None:
    everything(jobs)
    tally.count()
    before = tally.totals()
    with jobs.database.write() as connection:
        for table in ("artifacts", "jobs"):
            connection.execute(text(f"DELETE FROM {table}"))
    tally.count()
    assert tally.totals() == before


def test_what_happened_before_there_were_totals_is_not_counted(jobs: Jobs, tally: Tally) -> None:
    job, _ = jobs.submit(new_job())
    with jobs.database.write() as connection:
        connection.execute(
            insert(events).values(job_id=job.id, type="claimed", at=NOON, data={})
        )  # the column's default
    tally.count()
    assert tally.totals().counts == {"submitted": {"": 1}}


def test_a_stage_lasts_from_the_event_that_begins_it_to_the_next(jobs: Jobs, tally: Tally) -> None:
    job, _ = jobs.submit(new_job())
    time.sleep(0.15)
    jobs.claim(job.id, lease_seconds=60)
    for stage in ("merging", "publishing"):
        jobs.set_stage(job.id, token_of(jobs, job.id), stage)
        file = StoredFile(name=stage, key=f"{job.id}/{stage}", size=1, sha256="0" * 64)
        jobs.record_shard(job.id, token_of(jobs, job.id), file, {})
    jobs.publish(job.id, token_of(jobs, job.id), ARTIFACT)
    tally.count()
    stages = tally.totals().stages
    moments = [event.at for event in jobs.events(job.id) if event.type != "shard"]
    taken = [(after - before).total_seconds() for before, after in pairwise(moments)]
    assert set(stages) == {"queued", "resolving", "merging", "publishing"}
    for stage, seconds in zip(("queued", "resolving", "merging", "publishing"), taken, strict=True):
        assert stages[stage].seconds == pytest.approx(seconds, abs=0.0011)
        assert stages[stage].at_most[-1] == 1
    assert stages["queued"].at_most[0] == 0, "0.15 s are over the first bound"


@pytest.mark.parametrize(
    ("began", "ended", "stage"),
    [
        (("submitted", {}), ("claimed", {}), "queued"),
        (("handed_back", {}), ("claimed", {}), "queued"),
        (("worker_lost", {}), ("claimed", {}), "queued"),
        (("claimed", {}), ("stage", {"stage": "merging"}), "resolving"),
        (("stage", {"stage": "merging"}), ("stage", {"stage": "publishing"}), "merging"),
        (("stage", {"stage": "publishing"}), ("succeeded", {"size": 1}), "publishing"),
        (("stage", {"stage": "merging"}), ("handed_back", {}), "merging"),
        (("stage", {"stage": "merging"}), ("worker_lost", {"reason": "stalled"}), None),
    ],
)
def test_the_stage_that_an_event_ends(
    began: tuple[str, dict[str, str]], ended: tuple[str, dict[str, str]], stage: str | None
) -> None:
    first = Happened(type=began[0], at=NOON, data=began[1])
    last = Happened(type=ended[0], at=NOON + timedelta(seconds=61.5), data=ended[1])
    found = {key: value for key, value in increments(last, first) if key[0] == "stage"}
    assert found == ({} if stage is None else {("stage", stage, "300.0"): 1, ("stage", stage, "sum"): 61_500})


def test_a_failure_with_the_workers_loss_is_no_time_in_the_queue() -> None:
    lost = Happened(type="worker_lost", at=NOON, data={"reason": "stalled"})
    failed = Happened(type="failed", at=NOON, data={"error": {"code": "worker_lost"}})
    assert {key[0] for key, _ in increments(failed, lost)} == {"finished", "failed"}


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0.1, "0.1"), (0.11, "1.0"), (14_400, "14400.0"), (14_401, "+Inf"), (-5, "0.1")]
)
def test_the_bucket_of_a_duration(seconds: float, bound: str) -> None:
    began = Happened(type="submitted", at=NOON, data={})
    ended = Happened(type="claimed", at=NOON + timedelta(seconds=seconds), data={})
    found = {key[2]: value for key, value in increments(ended, began) if key[0] == "stage"}
    assert found == {bound: 1, "sum": max(0, round(seconds * 1000))}
    assert bound in BOUND_NAMES


def test_the_load_is_what_waits_and_what_runs(jobs: Jobs, tally: Tally) -> None:
    for queue, count in (("a", 1), ("b", 3)):
        for _ in range(count):
            jobs.submit(new_job(queue=queue))
    running, cancelling = claimed(jobs), claimed(jobs)
    jobs.request_cancel(cancelling.id)
    load = tally.load()
    assert [(waiting.queue, waiting.jobs) for waiting in load.queues] == [("b", 3), ("a", 1)]
    assert (load.running, load.cancelling) == (1, 1)
    assert running.status == "running"
    oldest = min(job.created_at for job in jobs.list(status="queued").jobs)
    assert 0 <= load.queues[1].oldest_seconds <= (jobs.database.now() - oldest).total_seconds()


def test_counting_looks_at_no_event_that_is_counted(jobs: Jobs, database: Database) -> None:
    everything(jobs)
    Tally(database).count()
    statement = str(uncounted().compile(database.engine, compile_kwargs={"literal_binds": True}))
    with database.read() as connection:
        if database.dialect == "sqlite":
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {statement}")).all()
        else:
            connection.execute(text("SET LOCAL enable_seqscan = off"))  # so few rows are read faster without an index
            plan = connection.execute(text(f"EXPLAIN {statement}")).all()
    assert "ix_events_uncounted" in str(plan)
