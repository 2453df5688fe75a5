"""When a worker counts as deaf; ``tests/cli/test_up.py`` has a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.database import Database
from app.records.jobs import Jobs
from app.records.upkeep import Upkeep
from tests.records.submitting import new_job
from worker.deafness import DeafnessWatch

BROKEN = MergeyardError("internal", "x")


class Worker:
    """What the watch is told of its worker."""

    def __init__(self, database: Database, broker_url: str, queue: str) -> None:
        self.busy, self.heard = False, 0
        self.bell = Bell(broker_url)
        self.watch = DeafnessWatch(
            Upkeep(database),
            self.bell,
            queue=queue,
            seconds=10,
            busy=lambda: self.busy,
            heard=lambda: self.heard,
            leave=lambda: None,
        )


@pytest.fixture
def worker(database: Database, broker_url: str, queue: str) -> Iterator[Worker]:
    made = Worker(database, broker_url, queue)
    yield made
    made.bell.close()


def test_idling_beside_waiting_jobs_for_long_enough_is_deafness(worker: Worker, jobs: Jobs, queue: str) -> None:
    jobs.submit(new_job(queue=queue))
    assert [worker.watch.deaf(now) for now in (100, 105, 109.9, 110, 111)] == [False, False, False, True, True]


def test_an_empty_queue_other_queues_and_pauses_are_no_deafness(worker: Worker, database: Database, queue: str) -> None:
    jobs = Jobs(database, retry_seconds=60)
    jobs.submit(new_job(queue="another"))
    job, _ = jobs.submit(new_job(queue=queue))
    running = jobs.claim(job.id, lease_seconds=60)
    assert running is not None
    jobs.fail(job.id, running.lease_token or "", BROKEN, retry=True)
    assert not any(worker.watch.deaf(now) for now in (0, 100, 200))


def test_work_in_between_starts_the_time_anew(worker: Worker, jobs: Jobs, queue: str) -> None:
    jobs.submit(new_job(queue=queue))
    heard = []
    for now in range(0, 40, 4):
        worker.busy = now in (8, 16)
        heard.append(worker.watch.deaf(now))
    assert heard.index(True) * 4 == 32, "12 s after it was last busy: the first look after 10 s"


def test_a_worker_whose_doorbells_come_to_nothing_is_not_deaf(worker: Worker, jobs: Jobs, queue: str) -> None:
    jobs.submit(new_job(queue=queue))
    for now in range(0, 40, 4):
        worker.heard += 1
        assert not worker.watch.deaf(now)
    assert [worker.watch.deaf(now) for now in (40, 49, 50)] == [False, False, True], "none since"


def test_a_broker_that_is_away_is_waited_for(database: Database, jobs: Jobs, tmp_path: Path) -> None:
    worker = Worker(database, f"redis+socket://{tmp_path}/nobody.sock", "default")
    jobs.submit(new_job())
    assert not any(worker.watch.deaf(now) for now in (0, 100, 200))
    worker.bell.close()
