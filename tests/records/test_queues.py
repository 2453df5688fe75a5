"""What waits and who works, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import update

from app.records.database import Database
from app.records.job import Status
from app.records.jobs import Jobs
from app.records.key import Caller, Scope
from app.records.queues import Queues, Urgency
from app.records.tables import jobs as job_rows
from app.records.tables import workers as worker_rows
from app.records.workers import FORGOTTEN_SECONDS, LOST_SECONDS, NewWorker, Workers, WorkerState
from tests.records.submitting import claimed, new_job

READ = frozenset({Scope.READ})
ALICE, BOB = Caller(owner="alice", scopes=READ), Caller(owner="bob", scopes=READ)
ADMIN = Caller(owner="root", scopes=frozenset({Scope.ADMIN}))


@pytest.fixture
def workers(database: Database) -> Workers:
    return Workers(database)


@pytest.fixture
def start(workers: Workers) -> Callable[..., NewWorker]:
    def begin(name: str, *queues: str, seen_before: float = 0.0) -> NewWorker:
        made = NewWorker(name=name, host="gpu-1", process=7, queues=queues or ("default",), version="1.0")
        workers.beat(made, started_at=workers.database.now(), device=None)
        if seen_before:
            seen = workers.database.now() - timedelta(seconds=seen_before)
            with workers.database.write() as connection:
                connection.execute(update(worker_rows).where(worker_rows.c.name == name).values(seen_at=seen))
        return made

    return begin


class TestWorkers:
    def test_a_worker_is_there_from_its_first_beat_until_it_leaves(
        self, workers: Workers, start: Callable[..., NewWorker]
    ) -> None:
        start("one", "fast")
        (found,) = workers.list()
        assert (found.name, found.host, found.process, found.queues) == ("one", "gpu-1", 7, ["fast"])
        assert (found.state, found.device, found.job, found.version) == (WorkerState.IDLE, None, None, "1.0")
        workers.leave("one")
        assert workers.list() == []

    def test_its_device_outlives_its_row(self, workers: Workers, start: Callable[..., NewWorker]) -> None:
        made = start("one")
        workers.set_device("one", "cuda: H100")
        began = workers.list()[0].started_at
        assert workers.beat(made, started_at=began, device=None) == "cuda: H100"
        workers.leave("one")
        workers.beat(made, started_at=began, device="cuda: H100")
        assert (workers.list()[0].device, workers.list()[0].started_at) == ("cuda: H100", began)

    def test_one_that_is_silent_is_lost_then_forgotten(self, workers: Workers, start: Callable[..., NewWorker]) -> None:
        start("alive", seen_before=LOST_SECONDS - 5)
        made = start("silent", seen_before=LOST_SECONDS + 5)
        start("gone", seen_before=FORGOTTEN_SECONDS + 5)
        assert [(one.name, one.state) for one in workers.list()] == [
            ("alive", WorkerState.IDLE),
            ("gone", WorkerState.LOST),
            ("silent", WorkerState.LOST),
        ]
        assert workers.forget() == 1
        assert [one.name for one in workers.list()] == ["alive", "silent"]
        workers.beat(made, started_at=workers.database.now(), device=None)
        assert workers.list()[1].state is WorkerState.IDLE, "it was only late"

    def test_a_job_is_told_to_those_who_may_see_it(
        self, workers: Workers, jobs: Jobs, start: Callable[..., NewWorker]
    ) -> None:
        start("one")
        job, _ = jobs.submit(new_job(owner="alice"))
        held = jobs.claim(job.id, lease_seconds=60, worker="one", process=8)
        assert held is not None
        told = {caller.owner: workers.list(by=caller)[0] for caller in (ALICE, BOB, ADMIN)}
        assert {owner: worker.job for owner, worker in told.items()} == {"alice": job.id, "bob": None, "root": job.id}
        assert {worker.state for worker in told.values()} == {WorkerState.BUSY}
        jobs.request_cancel(job.id)
        assert workers.list()[0].job == job.id, "it has not let go yet"
        jobs.confirm_cancelled(job.id, held.lease_token or "")
        assert workers.list()[0].state is WorkerState.IDLE

    def test_a_job_is_its_last_claimants(self, workers: Workers, jobs: Jobs, start: Callable[..., NewWorker]) -> None:
        start("first")
        start("second")
        job, _ = jobs.submit(new_job())
        first = jobs.claim(job.id, lease_seconds=60, worker="first")
        assert first is not None
        jobs.hand_back(job.id, first.lease_token or "")
        jobs.claim(job.id, lease_seconds=60, worker="second")
        assert [one.job for one in workers.list()] == [None, job.id]


class TestQueues:
    def test_what_waits_is_counted_by_urgency_and_what_runs_beside_it(self, jobs: Jobs, database: Database) -> None:
        oldest, _ = jobs.submit(new_job(queue="q", priority=5))
        for priority in (1, 0, -3, -3):
            jobs.submit(new_job(queue="q", priority=priority))
        claimed(jobs, queue="q")
        with database.write() as connection:
            since = database.now() - timedelta(seconds=100)
            connection.execute(update(job_rows).where(job_rows.c.id == oldest.id).values(created_at=since))
        (queue,) = Queues(database).list()
        assert {kind: waiting.jobs for kind, waiting in queue.waiting.items()} == {
            Urgency.HIGH: 2,
            Urgency.NORMAL: 1,
            Urgency.LOW: 2,
        }
        assert 100 <= queue.waiting[Urgency.HIGH].oldest_seconds < 160
        assert 0 <= queue.waiting[Urgency.LOW].oldest_seconds < 60
        assert (queue.name, queue.running, queue.workers) == ("q", 1, [])

    def test_what_has_finished_is_in_no_queue(self, jobs: Jobs, database: Database) -> None:
        job, _ = jobs.submit(new_job())
        assert jobs.request_cancel(job.id).status is Status.CANCELLED
        assert Queues(database).list() == []

    def test_a_queue_names_its_living_workers(
        self, jobs: Jobs, database: Database, start: Callable[..., NewWorker]
    ) -> None:
        start("one", "a")
        start("two", "a")
        start("lost", "a", "b", seen_before=LOST_SECONDS + 5)
        jobs.submit(new_job(queue="c"))
        assert {queue.name: queue.workers for queue in Queues(database).list()} == {"a": ["one", "two"], "c": []}

    def test_names_that_others_made_up_are_not_told(
        self, jobs: Jobs, database: Database, start: Callable[..., NewWorker]
    ) -> None:
        start("one", "served")
        jobs.submit(new_job(queue="secret-project", owner="alice"))
        jobs.submit(new_job(queue="served", owner="alice"))
        told = {caller.owner: Queues(database).list(by=caller) for caller in (ALICE, BOB, ADMIN)}
        assert [queue.name for queue in told["bob"]] == ["served"]
        assert told["bob"][0].waiting[Urgency.NORMAL].jobs == 1, "how long one will wait is everybody's business"
        for owner in ("alice", "root"):
            assert [queue.name for queue in told[owner]] == ["secret-project", "served"]
