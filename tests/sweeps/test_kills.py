"""Workers that die, stop and lose their lease in the middle of a sweep: no point is lost, and none is scored twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from app.api.envelope import Running
from app.api.scoring import new_job
from app.errors import MergeyardError
from app.records.job import CancelRequested, Job, Kind, LeaseLost, Status
from app.records.points import Points
from app.sweeps.planning import SweptTask, plan_sweep
from app.tasks.task import TaskScore
from tests.sweeps.asking import RECIPE, TASKS
from tests.worker.attempts import lonely_yard, place_in
from tests.worker.yard import Yard, open_yard, worker
from worker.engine.kernels import load
from worker.job import Ending, work
from worker.lease import StopRequest

GRID = {"density": [0.3, 0.9], "lambda": [0.5, 1.0]}
WHOLE = 7  # the base, two models by themselves, and four points


@pytest.fixture
def yard(tmp_path: Path, chat_root: Path, broker_url: str, queue: str, database_url: str) -> Iterator[Yard]:
    """A yard without a worker, once on each database."""
    with open_yard(tmp_path, chat_root, broker_url, queue, database_url=database_url) as opened:
        yield opened


def submit(yard: Yard, *, ring: bool = True) -> Job:
    tasks = [SweptTask(**task) for task in TASKS]
    planned = plan_sweep(RECIPE, GRID, tasks, yard.resolver("local"))
    asked = {"recipe": RECIPE, "grid": GRID, "tasks": TASKS}
    running = Running(queue=yard.settings.queue)
    new = new_job(Kind.SWEEP, asked, running, planned, owner="local", settings=yard.settings, merges=())
    job, _ = yard.jobs.submit(new)
    if ring:
        yard.bell.ring(job.id, job.queue)
    return job


def now(yard: Yard, job: Job) -> Job:
    return yard.jobs.get(job.id, kind=None)


def scored(yard: Yard, job: Job) -> list[int]:
    """The numbers of the points that events tell of, in the order they were scored."""
    found = yard.jobs.events(job.id, kind=None)
    return [event.data["number"] for event in found if event.type == "point"]


def until_scored(yard: Yard, job: Job, count: int) -> None:
    yard.until(lambda: len(scored(yard, job)) >= count)
    assert not now(yard, job).status.finished, "too fast to be caught in the middle"


def claims(yard: Yard, job: Job) -> list[int]:
    found = yard.jobs.events(job.id, kind=None)
    return [event.data["process"] for event in found if event.type == "claimed"]


def assert_whole(yard: Yard, job: Job, clean: dict[str, object]) -> None:
    yard.until(lambda: now(yard, job).status.finished)
    done = now(yard, job)
    assert done.status is Status.SUCCEEDED, done.error
    assert scored(yard, job) == list(range(WHOLE)), "every point once, in order"
    assert {point.name: point.scores for point in Points(yard.jobs.database).of(job.id)} == clean
    kinds = [event.type for event in yard.jobs.events(job.id, kind=None)]
    assert kinds.count("succeeded") == 1 and done.artifact == {"size": 0, "files": []}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, chat_root: Path) -> dict[str, object]:
    """The scores of a sweep that nothing happens to, by point."""
    with lonely_yard(tmp_path_factory.mktemp("undisturbed"), chat_root) as alone:
        job = submit(alone, ring=False)
        place = replace(place_in(alone), kernels=load("cpu"))
        assert work(place, job.id, StopRequest()) is Ending.PUBLISHED
        found = {point.name: point.scores for point in Points(alone.jobs.database).of(job.id)}
    assert None not in found.values() and len(found) == WHOLE
    return dict(found)


def test_a_killed_worker_loses_no_point(yard: Yard, clean: dict[str, object]) -> None:
    with worker(yard):
        job = submit(yard)
        for count in (2, 4):  # its process, twice
            until_scored(yard, job, count)
            before = len(claims(yard, job))
            yard.until(lambda: now(yard, job).status is Status.RUNNING)
            process = claims(yard, job)[-1]
            psutil.Process(process).send_signal(signal.SIGKILL)
            yard.until(lambda before=before: len(claims(yard, job)) > before)  # type: ignore[misc]
        assert_whole(yard, job, clean)
        assert len(claims(yard, job)) == 3 and len(now(yard, job).failures) == 2


def test_a_killed_host_loses_no_point(yard: Yard, clean: dict[str, object]) -> None:
    """All of its worker's processes at once: the lease runs out, and another worker goes on."""
    with worker(yard) as first:
        job = submit(yard)
        until_scored(yard, job, 3)
        for process in (*first.children(recursive=True), first):
            process.send_signal(signal.SIGKILL)
    with worker(yard):
        assert_whole(yard, job, clean)


def test_sigterm_hands_it_back_with_its_scores(yard: Yard, clean: dict[str, object]) -> None:
    with worker(yard) as first:
        job = submit(yard)
        until_scored(yard, job, 2)
        first.send_signal(signal.SIGTERM)
        first.wait(30)
    kept = now(yard, job)
    assert (kept.status, kept.attempt) == (Status.QUEUED, 0) and len(scored(yard, job)) >= 2
    with worker(yard):
        assert_whole(yard, job, clean)


def test_a_cancelled_sweep_stops_within_a_point(yard: Yard) -> None:
    with worker(yard):
        job = submit(yard)
        until_scored(yard, job, 1)
        yard.jobs.request_cancel(job.id, kind=Kind.SWEEP)
        yard.until(lambda: now(yard, job).status.finished)
    assert now(yard, job).status is Status.CANCELLED and len(scored(yard, job)) < WHOLE


class TestTheRows:
    def score(self, value: float) -> TaskScore:
        return TaskScore(name="first", metric="nll", score=value, standard_error=0.0, examples=3)

    def test_who_lost_the_lease_records_nothing(self, yard: Yard) -> None:
        job, points = submit(yard, ring=False), Points(yard.jobs.database)
        claimed = yard.jobs.claim(job.id, lease_seconds=60)
        assert claimed is not None and claimed.lease_token is not None
        with pytest.raises(LeaseLost):
            points.record(job.id, "0" * 32, 0, [self.score(1.0)])
        assert points.of(job.id)[0].scores is None and scored(yard, job) == []

    def test_a_point_keeps_its_first_scores(self, yard: Yard) -> None:
        job, points = submit(yard, ring=False), Points(yard.jobs.database)
        claimed = yard.jobs.claim(job.id, lease_seconds=60)
        assert claimed is not None and claimed.lease_token is not None
        for value in (1.0, 2.0):
            points.record(job.id, claimed.lease_token, 4, [self.score(value)])
        found = points.of(job.id)[4].scores
        assert found is not None and found[0].score == 1.0
        assert scored(yard, job) == [4]

    def test_it_cannot_succeed_once_a_cancel_was_accepted(self, yard: Yard) -> None:
        job = submit(yard, ring=False)
        claimed = yard.jobs.claim(job.id, lease_seconds=60)
        assert claimed is not None and claimed.lease_token is not None
        yard.jobs.request_cancel(job.id, kind=Kind.SWEEP)
        with pytest.raises(CancelRequested):
            yard.jobs.conclude(job.id, claimed.lease_token)
        yard.jobs.confirm_cancelled(job.id, claimed.lease_token)
        with pytest.raises(MergeyardError, match="The sweep has already"):
            done = submit(yard, ring=False)
            held = yard.jobs.claim(done.id, lease_seconds=60)
            assert held is not None and held.lease_token is not None
            yard.jobs.conclude(done.id, held.lease_token)
            yard.jobs.request_cancel(done.id, kind=Kind.SWEEP)

    def test_it_reserves_nothing_of_the_store(self, yard: Yard) -> None:
        assert now(yard, submit(yard, ring=False)).reserved_bytes == 0
