"""Real worker processes on a real broker: the way of a job, a warm child, and everything that can be killed."""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import MergeyardError
from app.records.job import Job, Status
from app.records.workers import Workers, WorkerState
from app.settings import Settings
from tests import servers, tiny
from tests.faults.cuts import server_address, through
from tests.faults.proxy import Proxy, proxied
from tests.worker.slow_worker import STARTING
from tests.worker.yard import SHARDED, Yard, open_yard, pool_child, worker
from worker.celery import run_worker
from worker.engine.sinks import SCRATCH


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path, broker_url: str) -> Iterator[Yard]:
    """One yard with one worker, for the tests that leave the worker alive."""
    queue = f"test-{secrets.token_hex(6)}"
    with open_yard(tmp_path_factory.mktemp("yard"), tiny_models, broker_url, queue) as opened:
        with worker(opened):
            yield opened
        servers.forget_queue(broker_url, queue)


@pytest.fixture
def empty_yard(tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, database_url: str) -> Iterator[Yard]:
    """A yard without a worker, once on each database."""
    with open_yard(tmp_path, tiny_models, broker_url, queue, database_url=database_url) as opened:
        yield opened


def assert_published(yard: Yard, job: Job) -> None:
    """The artifact is whole: every file in the row is in the store and holds its digest, and there is nothing else."""
    assert job.status is Status.SUCCEEDED and job.artifact is not None, job.error
    files = job.artifact["files"]
    for file in files:
        data = yard.store.path(file["key"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
    assert job.artifact["size"] == sum(file["size"] for file in files)
    yard.until(lambda: yard.files(job) == sorted(file["key"] for file in files))
    manifest = json.loads(yard.store.path(job.artifact["manifest_key"]).read_bytes())
    assert manifest["fingerprint"] == job.plan_digest
    assert {file["name"] for file in manifest["files"]} | {"mergeyard.json"} == {file["name"] for file in files}
    assert yard.kinds(job).count("succeeded") == 1


def test_a_job_goes_from_the_doorbell_to_the_artifact(yard: Yard) -> None:
    job = yard.finish(yard.submit(**SHARDED))
    assert_published(yard, job)
    assert yard.kinds(job) == ["submitted", "claimed", "succeeded"]
    stages = [event.data["stage"] for event in yard.jobs.events(job.id) if event.type == "stage"]
    assert stages == ["merging", "publishing"]
    assert job.progress_bytes == job.total_bytes > 0
    names = [file["name"] for file in (job.artifact or {})["files"]]
    assert {"config.json", "model.safetensors.index.json", "README.md", "mergeyard.json"} < set(names)


def test_the_child_stays_warm_between_jobs(yard: Yard) -> None:
    first, second = yard.finish(yard.submit()), yard.finish(yard.submit())
    assert yard.processes(first) == yard.processes(second)


def test_a_worker_is_listed_while_it_lives_with_what_it_does(empty_yard: Yard) -> None:
    listed = Workers(empty_yard.jobs.database).list
    with worker(empty_yard) as process:
        empty_yard.until(lambda: [one.device for one in listed()] == ["cpu"])
        (idle,) = listed()
        assert (idle.process, idle.queues, idle.state) == (process.pid, [empty_yard.settings.queue], WorkerState.IDLE)
        job = empty_yard.submit(**SHARDED)
        empty_yard.until_shards(job, 1)
        (busy,) = listed()
        assert (busy.name, busy.state, busy.job) == (idle.name, WorkerState.BUSY, job.id)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert listed() == [], "it stopped in good order"


def test_two_doorbells_are_one_merge(yard: Yard) -> None:
    job = yard.submit()
    yard.bell.ring(job.id, job.queue)
    assert_published(yard, yard.finish(job))
    after = yard.finish(yard.submit())
    assert yard.kinds(job).count("claimed") == 1 and after.status is Status.SUCCEEDED


def test_a_lost_doorbell_is_rung_again(yard: Yard) -> None:
    assert_published(yard, yard.finish(yard.submit(ring=False)))


def test_a_source_that_changed_after_planning_fails_the_job_and_replaces_the_child(yard: Yard) -> None:
    before = yard.finish(yard.submit())
    weights = yard.settings.roots[0] / "sql" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    job = yard.submit(ring=False)
    weights.write_bytes(kept[:-2] + b"\x11\x11")
    yard.bell.ring(job.id, job.queue)
    failed = yard.finish(job)
    assert failed.status is Status.FAILED and failed.error and failed.error["code"] == "source_changed"
    assert failed.error["fault"] == "user" and failed.attempt == 1, "no retry can mend it"
    after = yard.finish(yard.submit())
    assert_published(yard, after)
    assert yard.processes(before) == yard.processes(job) != yard.processes(after)


def test_a_cancel_in_the_middle_of_a_merge_leaves_nothing(yard: Yard) -> None:
    job = yard.submit(**SHARDED)
    yard.until_shards(job, 1)
    assert yard.jobs.request_cancel(job.id).status is Status.CANCELLING
    cancelled = yard.finish(job, seconds=10)
    assert cancelled.status is Status.CANCELLED and cancelled.artifact is None
    yard.until(lambda: yard.files(job) == [])
    assert yard.processes(yard.finish(yard.submit())) == yard.processes(job), "a cancel is no failure: the child stays"


def test_a_killed_child_costs_an_attempt_and_keeps_the_finished_shards(yard: Yard) -> None:
    job = yard.submit(**SHARDED)
    yard.until_shards(job, 2)
    pool_child(yard, job).kill()
    assert_adopted(yard, job)


def test_a_child_killed_in_an_earlier_document_leaves_nothing_of_it(yard: Yard) -> None:
    job = yard.submit(tiny.documents(**SHARDED))
    yard.until(lambda: any(SCRATCH in key for key in yard.files(job)))
    pool_child(yard, job).kill()
    done = yard.finish(job)
    assert_published(yard, done)
    assert done.attempt == 2 and yard.kinds(job) == ["submitted", "claimed", "worker_lost", "claimed", "succeeded"]


def test_a_child_killed_in_an_earlier_document_of_a_cancelled_merge_leaves_nothing_of_it(yard: Yard) -> None:
    job = yard.submit(tiny.documents(**SHARDED))
    yard.until(lambda: any(SCRATCH in key for key in yard.files(job)))
    pool_child(yard, job).kill()
    yard.jobs.request_cancel(job.id)
    assert yard.finish(job).status is Status.CANCELLED
    yard.until(lambda: yard.files(job) == [])


def test_a_killed_worker_costs_an_attempt_and_keeps_the_finished_shards(empty_yard: Yard) -> None:
    job = empty_yard.submit(**SHARDED)
    with worker(empty_yard) as first:
        empty_yard.until_shards(job, 2)
        child = pool_child(empty_yard, job)
        first.kill()
        first.wait(10)
        empty_yard.until(lambda: not child.is_running())
    with worker(empty_yard):
        assert_adopted(empty_yard, job)


def assert_adopted(yard: Yard, job: Job) -> None:
    """A second attempt publishes, with the very files that the first one had finished."""
    finished = {shard.file.name: shard.file for shard in yard.jobs.shards(job.id)}
    assert len(finished) >= 2
    stats = {name: yard.store.path(file.key).stat() for name, file in finished.items()}
    done = yard.finish(job)
    assert_published(yard, done)
    assert done.attempt == 2 and yard.kinds(job) == ["submitted", "claimed", "worker_lost", "claimed", "succeeded"]
    published = {file["name"]: file for file in (done.artifact or {})["files"]}
    for name, file in finished.items():
        now = yard.store.path(file.key).stat()
        assert published[name]["key"] == file.key
        assert (now.st_ino, now.st_mtime_ns) == (stats[name].st_ino, stats[name].st_mtime_ns)
    tokens = {file["key"].split("/")[1] for file in published.values()}
    assert len(tokens) == 2, "the rest was made by the second attempt"


def test_sigterm_hands_the_job_back_at_once_and_costs_no_attempt(empty_yard: Yard) -> None:
    job = empty_yard.submit(**SHARDED)
    with worker(empty_yard) as process:
        empty_yard.until_shards(job, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    back = empty_yard.jobs.get(job.id)
    assert (back.status, back.attempt) == (Status.QUEUED, 0)
    assert empty_yard.kinds(job) == ["submitted", "claimed", "handed_back"]
    assert empty_yard.bell.waiting(back.queue) >= 1, "it rang for the next worker"
    kept = sorted(shard.file.key for shard in empty_yard.jobs.shards(job.id))
    assert kept and empty_yard.files(job) == kept, "finished shards stay for the next attempt, and nothing else"


def test_a_database_that_restarts_in_the_middle_of_a_merge_costs_no_attempt(
    tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, postgres_url: str
) -> None:
    """Every connection ends and new ones are refused for a while, which is shorter than the lease."""
    with servers.temporary_database(postgres_url) as url, ExitStack() as stack:
        yard = stack.enter_context(
            open_yard(tmp_path, tiny_models, broker_url, queue, database_url=url, lease_seconds=20.0)
        )
        stack.enter_context(worker(yard))
        job = yard.submit(**SHARDED)
        yard.until_shards(job, 2)
        with servers.refusing(postgres_url, url):
            time.sleep(1.5)
        done = yard.finish(job)
        assert_published(yard, done)
        assert done.attempt == 1 and yard.kinds(job) == ["submitted", "claimed", "succeeded"]


def test_a_database_that_hangs_costs_an_attempt_and_no_worker(
    tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, postgres_database: str
) -> None:
    """It takes connections and answers nothing, for longer than the lease."""
    between = Proxy(("127.0.0.1", 0), server_address(postgres_database), random.Random(0), {"none": 1})
    with proxied(between), ExitStack() as stack:
        yard = stack.enter_context(open_yard(tmp_path, tiny_models, broker_url, queue, database_url=postgres_database))
        via = {"database_url": through(postgres_database, between.port), "database_seconds": 1.0}
        cut_off = replace(yard, settings=yard.settings.model_copy(update=via))
        process = stack.enter_context(worker(cut_off))
        job = yard.submit(**SHARDED)
        yard.until_shards(job, 2)
        child = pool_child(yard, job)
        between.hang()
        yard.until(lambda: "worker_lost" in yard.kinds(job))
        yard.until(lambda: not child.is_running())
        between.recover()
        assert_published(yard, yard.finish(job))
        assert yard.kinds(job) == ["submitted", "claimed", "worker_lost", "claimed", "succeeded"]
        assert process.is_running() and len(set(yard.processes(job))) == 2


def test_an_idle_worker_stops_on_sigterm(empty_yard: Yard) -> None:
    with worker(empty_yard) as process:
        empty_yard.until(lambda: len(process.children()) > 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_worker_whose_child_is_still_starting_stops_on_sigterm(
    empty_yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing torch takes a loaded machine longer than a supervisor waits. The job is not lost: its row waits."""
    starting = tmp_path / "starting"
    monkeypatch.setenv(STARTING, str(starting))
    with worker(empty_yard) as process:
        job = empty_yard.submit()
        empty_yard.until(starting.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert empty_yard.kinds(job) == ["submitted"]


def test_a_worker_hears_again_after_its_broker_restarted(tmp_path: Path, tiny_models: Path) -> None:
    with servers.short_folder() as folder, ExitStack() as stack:
        socket = folder / "valkey.sock"
        with servers.valkey(socket) as url:
            yard = stack.enter_context(open_yard(tmp_path, tiny_models, url, "default"))
            stack.enter_context(worker(yard))
            yard.finish(yard.submit())
        job = yard.submit(ring=False)
        with pytest.raises(MergeyardError):
            yard.bell.ring(job.id, job.queue)
        with servers.valkey(socket):
            assert_published(yard, yard.finish(job))


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"database_url": "postgresql://nobody@127.0.0.1:1/x"}, "database_unavailable"),
        ({}, "not_ready"),
        ({"device": "cuda"}, "not_supported"),
    ],
)
def test_a_worker_says_why_it_cannot_start(
    tmp_path: Path, settings: dict[str, str], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MergeyardError) as caught:
        run_worker(Settings(data_dir=tmp_path, **settings))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_a_worker_needs_its_broker(tmp_path: Path, sqlite_url: str) -> None:
    with pytest.raises(MergeyardError) as caught:
        run_worker(Settings(data_dir=tmp_path, database_url=sqlite_url))
    assert caught.value.code == "broker_unavailable"
