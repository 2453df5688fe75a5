"""A child that dies in the middle of a merge is missed at once by its worker: here no lease runs out within a test."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.errors import MergeyardError
from app.records.database import Database
from app.records.job import Job, Status
from app.records.jobs import Jobs
from app.records.transitions import LOST
from tests.records.submitting import ARTIFACT, new_job
from tests.worker.slow_worker import FAULT
from tests.worker.yard import SHARDED, Yard, open_yard, pool_child, worker
from worker.deaths import Death, Undertaker, child_died

LONG_LEASE = 3600.0


@pytest.fixture
def yard(tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, database_url: str) -> Iterator[Yard]:
    """With a worker, once on each database."""
    with ExitStack() as stack:
        values: dict[str, Any] = {"database_url": database_url, "lease_seconds": LONG_LEASE}
        opened = stack.enter_context(open_yard(tmp_path, tiny_models, broker_url, queue, **values))
        stack.enter_context(worker(opened))
        yield opened


def test_a_killed_childs_merge_is_tried_again_at_once_and_says_why(yard: Yard) -> None:
    job = yard.submit(**SHARDED)
    yard.until_shards(job, 2)
    pool_child(yard, job).kill()
    done = yard.finish(job)
    assert (done.status, done.attempt) == (Status.SUCCEEDED, 2)
    assert yard.kinds(job) == ["submitted", "claimed", "worker_lost", "claimed", "succeeded"]
    assert [failure["message"] for failure in done.failures] == [LOST["child_killed"]]
    assert "out-of-memory" in LOST["child_killed"]


def test_a_child_that_crashes_in_its_only_attempt_fails_the_merge_at_once(yard: Yard) -> None:
    job = yard.submit(max_attempts=1, **SHARDED)
    yard.until_shards(job, 1)
    pool_child(yard, job).send_signal(signal.SIGSEGV)
    failed = yard.finish(job)
    assert failed.status is Status.FAILED and failed.error and failed.error["code"] == "worker_lost"
    assert failed.error["message"].startswith(LOST["child_died"])
    after = yard.finish(yard.submit())
    assert after.status is Status.SUCCEEDED, "the worker has another child"


def test_a_killed_child_of_a_cancelled_merge_ends_it_at_once(yard: Yard) -> None:
    job = yard.submit(**SHARDED)
    yard.until_shards(job, 1)
    child = pool_child(yard, job)
    child.suspend()  # it must not hear of the cancel
    yard.jobs.request_cancel(job.id)
    child.kill()
    assert yard.finish(job).status is Status.CANCELLED


@pytest.mark.parametrize(("fault", "code"), [("memory", "out_of_memory"), ("cuda", "internal")])
def test_an_error_of_the_gpu_ends_one_attempt_and_its_process_and_no_worker(
    fault: str,
    code: str,
    tmp_path: Path,
    tiny_models: Path,
    broker_url: str,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no GPU here: the kernels raise what torch raises where there is one. CUDA in that process is lost."""
    marker = tmp_path / "fault"
    monkeypatch.setenv(FAULT, str(marker))
    with open_yard(tmp_path, tiny_models, broker_url, queue) as yard, worker(yard) as process:
        before = yard.finish(yard.submit())
        marker.write_text(fault)
        job, waiting = yard.submit(), yard.submit()
        failed, after = yard.finish(job), yard.finish(waiting)
        assert (failed.status, [failure["code"] for failure in failed.failures]) == (Status.SUCCEEDED, [code])
        assert after.status is Status.SUCCEEDED and after.failures == ()
        first, second = yard.processes(job)
        assert yard.processes(before) == [first], "it was warm"
        assert second != first and yard.processes(waiting) == [second], "its successor stays for the next"
        assert process.is_running() and "worker_lost" not in yard.kinds(job)


# ── what the dead child does not hold any more ───────────────────────────────────────────────────


def claimed_by_host_a(jobs: Jobs) -> Job:
    job, _ = jobs.submit(new_job())
    claimed = jobs.claim(job.id, lease_seconds=LONG_LEASE, worker="host-a", process=7)
    assert claimed is not None
    return claimed


def test_an_attempt_of_another_worker_goes_on(jobs: Jobs) -> None:
    job = claimed_by_host_a(jobs)
    jobs.hand_back(job.id, job.lease_token or "")
    other = jobs.claim(job.id, lease_seconds=LONG_LEASE, worker="host-b", process=7)
    assert jobs.lose(job.id, worker="host-a", process=7, reason="child_killed") is None
    assert jobs.get(job.id) == other


def test_what_was_published_before_the_death_stays_published(jobs: Jobs) -> None:
    job = claimed_by_host_a(jobs)
    done = jobs.publish(job.id, job.lease_token or "", ARTIFACT)
    assert jobs.lose(job.id, worker="host-a", process=7, reason="child_killed") is None
    assert jobs.get(job.id) == done


def test_a_dead_childs_token_holds_nothing(jobs: Jobs) -> None:
    job = claimed_by_host_a(jobs)
    back = jobs.lose(job.id, worker="host-a", process=7, reason="child_killed")
    assert back is not None and (back.status, back.attempt, back.lease_token) == (Status.QUEUED, 1, None)
    assert jobs.events(job.id)[-1].data == {"attempt": 1, "reason": "child_killed"}


# ── the undertaker ───────────────────────────────────────────────────────────────────────────────


class Rings:
    """A bell that notes."""

    def __init__(self) -> None:
        self.rung: list[str] = []

    def ring(self, job_id: str, queue: str, priority: int) -> None:
        self.rung.append(job_id)


def test_a_doorbell_that_died_in_a_childs_hand_is_rung_again(jobs: Jobs) -> None:
    job, _ = jobs.submit(new_job())
    bell = Rings()
    Undertaker(jobs, bell, worker="host-a", seconds=60).bury(  # type: ignore[arg-type]
        Death(job_id=job.id, pid=7, status="signal 9 (SIGKILL)")
    )
    assert bell.rung == [job.id] and jobs.get(job.id) == job


def test_a_pause_after_a_failure_is_kept(database: Database) -> None:
    jobs, bell = Jobs(database, retry_seconds=60), Rings()
    job = claimed_by_host_a(jobs)
    Undertaker(jobs, bell, worker="host-a", seconds=60).bury(  # type: ignore[arg-type]
        Death(job_id=job.id, pid=7, status="signal 11 (SIGSEGV)")
    )
    assert jobs.get(job.id).retry_at is not None and bell.rung == []
    assert jobs.get(job.id).failures[0]["message"] == LOST["child_died"]


def test_a_database_that_is_away_is_waited_for(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.deaths.PAUSE_SECONDS", 0.01)
    job, bell = claimed_by_host_a(jobs), Rings()
    answers = iter([MergeyardError("database_unavailable", "away")] * 3)

    class Flickering(Jobs):
        def lose(self, job_id: str, **values: Any) -> Job | None:
            for error in answers:
                raise error
            return super().lose(job_id, **values)

    undertaker = Undertaker(Flickering(jobs.database), bell, worker="host-a", seconds=60)  # type: ignore[arg-type]
    undertaker.start()
    child_died.send(sender=None, death=Death(job_id=job.id, pid=7, status="signal 9 (SIGKILL)"))
    deadline = time.monotonic() + 10
    while bell.rung != [job.id]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    undertaker.stop()
    assert jobs.get(job.id).status is Status.QUEUED
