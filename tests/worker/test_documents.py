"""Jobs of several documents: earlier ones are no part of the artifact, and nothing of them stays, however it ends."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.artifacts.store import LocalStore
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.job import Job, Status
from app.sources.resolver import Resolver
from tests import tiny
from tests.engine.merges import bytes_of, merge
from tests.worker.attempts import attempt, digests, failing, lonely_yard, place_in
from tests.worker.yard import SHARDED, Yard
from worker.engine.sinks import SCRATCH
from worker.job import Ending, Workplace
from worker.sink import StoreSink

EARLIER, LAST = 4, 20  # blocks of the first document, and of the second


@pytest.fixture
def yard(tmp_path: Path, tiny_models: Path) -> Iterator[Yard]:
    with lonely_yard(tmp_path, tiny_models) as opened:
        yield opened


@pytest.fixture
def place(yard: Yard) -> Workplace:
    return place_in(yard)


def scratch(yard: Yard, job: Job) -> list[str]:
    return [key for key in yard.files(job) if SCRATCH in key]


def test_the_artifact_is_the_last_document_s_and_nothing_else_stays(
    yard: Yard, place: Workplace, tmp_path: Path
) -> None:
    seen: list[str] = []
    job = yard.submit(tiny.documents(), ring=False)
    assert attempt(place, job, lambda: seen.extend(scratch(yard, job)), count=LAST) is Ending.PUBLISHED
    assert [key.partition(SCRATCH)[2] for key in seen] == ["/0/model.safetensors"]
    done = yard.jobs.get(job.id)
    assert done.status is Status.SUCCEEDED and done.artifact and done.progress_bytes == done.total_bytes
    files = {file["name"]: file["key"] for file in done.artifact["files"]}
    assert yard.files(job) == sorted(files.values())
    merge(make_plan(parse_recipe(tiny.documents()), Resolver(roots=yard.settings.roots)), tmp_path / "here", room="cpu")
    local = bytes_of(tmp_path / "here")
    assert local.keys() == files.keys()
    manifest = json.loads(yard.store.path(files["mergeyard.json"]).read_bytes())
    assert manifest["fingerprint"] == job.plan_digest
    assert [document["name"] for document in manifest["earlier"]] == ["both"]
    assert yard.store.path(files["model.safetensors"]).read_bytes() == local["model.safetensors"]


@pytest.mark.parametrize("block", [EARLIER, LAST])
def test_a_cancel_in_any_document_leaves_nothing(yard: Yard, place: Workplace, block: int) -> None:
    job = yard.submit(tiny.documents(**SHARDED), ring=False)
    assert attempt(place, job, lambda: yard.jobs.request_cancel(job.id), count=block) is Ending.CANCELLED
    assert yard.jobs.get(job.id).status is Status.CANCELLED and yard.files(job) == []


def test_a_full_disk_in_an_earlier_document_leaves_nothing(yard: Yard, place: Workplace) -> None:
    job = yard.submit(tiny.documents(**SHARDED), ring=False, max_attempts=2)
    full = failing(OSError(errno.ENOSPC, "No space left on device"))
    assert attempt(place, job, full, count=EARLIER) is Ending.FAILED
    assert yard.jobs.get(job.id).status is Status.QUEUED and yard.files(job) == []
    assert attempt(place, job, full, count=EARLIER) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.error and failed.error["code"] == "disk_full" and yard.files(job) == []


def test_a_store_too_small_for_earlier_documents_is_noticed_before_the_work(yard: Yard, place: Workplace) -> None:
    job = yard.submit(tiny.documents(), ring=False, max_attempts=1)
    needed = job.estimates["output_bytes"] + job.estimates["scratch_bytes"]

    class Small(LocalStore):
        def free(self) -> int:
            return int(needed) - 1

    assert attempt(replace(place, store=Small(yard.store.folder)), job) is Ending.NO_ROOM
    assert yard.jobs.events(job.id)[-1].data == {"needs": needed, "free": needed - 1}


def test_a_retry_makes_earlier_documents_anew_and_keeps_what_is_finished_of_the_last(
    yard: Yard, place: Workplace
) -> None:
    straight, broken = (yard.submit(tiny.documents(**SHARDED), ring=False) for _ in range(2))
    attempt(place, straight)
    assert attempt(place, broken, failing(ZeroDivisionError()), count=LAST + 4) is Ending.FAILED
    kept = {shard.file for shard in yard.jobs.shards(broken.id)}
    assert kept and yard.files(broken) == sorted(file.key for file in kept)
    assert attempt(place, broken) is Ending.PUBLISHED
    assert kept < {shard.file for shard in yard.jobs.shards(broken.id)}
    assert digests(yard, straight) == digests(yard, broken)


def test_earlier_documents_are_gone_before_the_result_is_published(yard: Yard) -> None:
    job = yard.jobs.claim(yard.submit(tiny.documents(), ring=False).id, lease_seconds=60)
    assert job is not None
    with StoreSink(yard.store, yard.jobs, job, lambda write: write()).scratch() as folder:
        (folder / "0").write_bytes(b"half a model")
        assert scratch(yard, job)
    assert yard.files(job) == []


def test_what_a_killed_attempt_left_goes_before_as_much_is_written_again(yard: Yard, place: Workplace) -> None:
    job = yard.submit(tiny.documents(), ring=False)
    left = yard.store.scratch(f"{job.id}/killed/{SCRATCH}") / "0" / "model.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half a model")
    seen: list[bool] = []
    assert attempt(place, job, lambda: seen.append(left.exists()), count=EARLIER) is Ending.PUBLISHED
    assert seen == [False]


def test_an_earlier_source_that_changed_fails_the_job(yard: Yard, place: Workplace) -> None:
    job = yard.submit(tiny.documents(), ring=False)
    weights = yard.settings.roots[0] / "sql" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert attempt(place, job) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.error and failed.error["code"] == "source_changed"
