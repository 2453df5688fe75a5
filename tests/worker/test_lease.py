"""The lease's thread and what it tells the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import worker.lease
from app.errors import MergeyardError
from app.records.database import Database
from app.records.job import Beat, CancelRequested, LeaseLost, Status
from app.records.jobs import Jobs
from tests.records.submitting import ARTIFACT, claimed
from worker.lease import Lease, Stopping, StopRequest


class Counting(Jobs):
    """Jobs that note the heartbeats, and fail them on demand."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.beats: list[int | None] = []
        self.away = False
        self._answers = threading.Event()
        self._answers.set()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """No heartbeat is answered meanwhile."""
        self._answers.clear()
        try:
            yield
        finally:
            self._answers.set()

    def heartbeat(self, job_id: str, token: str, **values: Any) -> Beat:
        self._answers.wait()
        self.beats.append(values["progress_bytes"])
        if self.away:
            raise MergeyardError("database_unavailable", "away")
        return super().heartbeat(job_id, token, **values)


@pytest.fixture
def jobs(sqlite_url: str) -> Iterator[Counting]:
    database = Database(sqlite_url)
    yield Counting(database)
    database.close()


def lease_of(jobs: Jobs, seconds: float, **changes: Any) -> Lease:
    return Lease(jobs, claimed(jobs, lease_seconds=seconds), seconds=seconds, stop=StopRequest(), **changes)


def until_raised(lease: Lease, error: type[Exception], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            lease.check()
        except error:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {error.__name__}")


def test_it_outlives_the_leases_first_seconds(jobs: Counting) -> None:
    with lease_of(jobs, 0.4) as lease:
        time.sleep(1.0)
        lease.check()
        assert jobs.claim(lease.job_id, lease_seconds=60) is None
    assert len(jobs.beats) >= 5, "a beat every quarter of the lease"


def test_progress_is_written_at_most_twice_a_second(jobs: Counting) -> None:
    with lease_of(jobs, 60) as lease:
        for done in range(200):
            lease.progress(done, 200)
            time.sleep(0.01)
        time.sleep(0.6)
    assert 2 <= len(jobs.beats) <= 6
    job = jobs.get(lease.job_id)
    assert (job.progress_bytes, job.total_bytes) == (199, 200)


def test_without_progress_it_beats_no_more_than_it_must(jobs: Counting) -> None:
    with lease_of(jobs, 60):
        time.sleep(1.2)
    assert jobs.beats == []


def test_a_cancel_is_heard_within_seconds_under_a_long_lease(jobs: Counting) -> None:
    with lease_of(jobs, 3600) as lease:
        jobs.request_cancel(lease.job_id)
        until_raised(lease, CancelRequested)


def test_a_cancel_request_reaches_the_engine(jobs: Counting) -> None:
    with lease_of(jobs, 0.4) as lease:
        lease.check()
        jobs.request_cancel(lease.job_id)
        until_raised(lease, CancelRequested)
        with pytest.raises(CancelRequested):
            lease.stage("publishing")


def test_a_job_that_somebody_else_took_stops_the_engine(jobs: Counting) -> None:
    with lease_of(jobs, 0.4) as lease:
        jobs.hand_back(lease.job_id, lease.token)
        jobs.claim(lease.job_id, lease_seconds=60)
        until_raised(lease, LeaseLost)


def test_a_database_that_stays_away_longer_than_the_lease_stops_the_engine(jobs: Counting) -> None:
    with lease_of(jobs, 0.4) as lease:
        jobs.away = True
        time.sleep(0.25)
        lease.check()
        until_raised(lease, LeaseLost)


def test_a_database_that_does_not_answer_stops_the_engine_when_the_lease_is_over(jobs: Counting) -> None:
    """The heartbeat hangs in it, so nothing that it could tell counts."""
    with lease_of(jobs, 0.4) as lease, jobs.hanging():
        time.sleep(0.25)
        lease.check()
        until_raised(lease, LeaseLost)


def test_an_ending_waits_for_a_database_that_comes_back(jobs: Counting) -> None:
    with lease_of(jobs, 30) as lease:
        answers = iter([MergeyardError("database_unavailable", "away"), None])

        def publish() -> Any:
            if (answer := next(answers)) is not None:
                raise answer
            return jobs.publish(lease.job_id, lease.token, ARTIFACT)

        assert lease.persist(publish).status is Status.SUCCEEDED


def test_a_stop_request_reaches_the_engine(jobs: Counting) -> None:
    stop = StopRequest()
    with Lease(jobs, claimed(jobs), seconds=60, stop=stop) as lease:
        lease.check()
        stop.made = True
        with pytest.raises(Stopping):
            lease.check()


def test_a_merge_that_does_not_stop_is_handed_back_and_its_process_ended(
    jobs: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.lease, "HANG_SECONDS", 0.2)
    ended = threading.Event()
    stop = StopRequest(made=True)
    with Lease(jobs, claimed(jobs), seconds=1, stop=stop, abandon=lambda _: ended.set()) as lease:
        assert ended.wait(5)
    assert jobs.get(lease.job_id).status is Status.QUEUED


def test_a_cancelled_merge_that_does_not_stop_is_cancelled_and_its_process_ended(
    jobs: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.lease, "HANG_SECONDS", 0.2)
    ended = threading.Event()
    with lease_of(jobs, 1, abandon=lambda _: ended.set()) as lease:
        jobs.request_cancel(lease.job_id)
        assert ended.wait(5)
    assert jobs.get(lease.job_id).status is Status.CANCELLED
