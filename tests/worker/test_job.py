"""Every way an attempt can end, in this process: what the row says, what stays in the store, what the user reads."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.job import Job, NewJob, Shard, Status
from app.records.key import Caller
from app.records.owned import OwnedUploads
from app.records.upkeep import Upkeep
from app.sources.uploads import UploadStore
from tests.worker.attempts import Interrupting, attempt, digests, failing, lonely_yard, place_in
from tests.worker.yard import SHARDED, Yard
from worker.job import Ending, Workplace, work
from worker.lease import StopRequest


@pytest.fixture
def yard(tmp_path: Path, tiny_models: Path) -> Iterator[Yard]:
    with lonely_yard(tmp_path, tiny_models) as opened:
        yield opened


@pytest.fixture
def place(yard: Yard) -> Workplace:
    return place_in(yard)


def test_a_merge_is_published_and_leaves_only_its_files(yard: Yard, place: Workplace) -> None:
    job = yard.submit(ring=False)
    assert attempt(place, job) is Ending.PUBLISHED
    done = yard.jobs.get(job.id)
    assert done.status is Status.SUCCEEDED and done.artifact
    assert yard.files(job) == sorted(file["key"] for file in done.artifact["files"])
    assert attempt(place, job) is Ending.NOT_OURS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "internal"),
        (ZeroDivisionError("secret inside"), "internal"),
    ],
)
def test_a_system_failure_is_retried_until_no_attempt_is_left(
    yard: Yard, place: Workplace, error: BaseException, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = yard.submit(ring=False, max_attempts=2, **SHARDED)
    with caplog.at_level(logging.ERROR, "mergeyard"):
        assert attempt(place, job, failing(error)) is Ending.FAILED
    assert yard.jobs.get(job.id).status is Status.QUEUED
    kept = sorted(shard.file.key for shard in yard.jobs.shards(job.id))
    assert kept and yard.files(job) == kept, "only what a retry can use stays"
    assert attempt(place, job, failing(error), count=1) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.status is Status.FAILED and failed.error and failed.error["code"] == code
    assert yard.files(job) == [], "a failed merge leaves nothing"
    told = str([failed, yard.jobs.events(job.id)])
    assert "Traceback" not in told and "secret" not in told
    assert any(record.exc_info for record in caplog.records), "the trace is in the worker's log"


def test_a_retry_keeps_the_shards_and_gives_the_same_bytes(yard: Yard, place: Workplace) -> None:
    straight, broken = yard.submit(ring=False, **SHARDED), yard.submit(ring=False, **SHARDED)
    attempt(place, straight)
    attempt(place, broken, failing(ZeroDivisionError()))
    kept = {shard.file for shard in yard.jobs.shards(broken.id)}
    assert attempt(place, broken) is Ending.PUBLISHED
    assert kept < {shard.file for shard in yard.jobs.shards(broken.id)}
    assert digests(yard, straight) == digests(yard, broken)


def test_a_recorded_shard_whose_bytes_changed_is_made_again(yard: Yard, place: Workplace) -> None:
    straight, broken = yard.submit(ring=False, **SHARDED), yard.submit(ring=False, **SHARDED)
    attempt(place, straight)
    attempt(place, broken, failing(ZeroDivisionError()))
    damaged, missing, *_ = (yard.store.path(shard.file.key) for shard in yard.jobs.shards(broken.id))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    missing.unlink()
    assert attempt(place, broken) is Ending.PUBLISHED
    assert digests(yard, straight) == digests(yard, broken)
    assert not damaged.exists(), "what nobody adopted is swept"


def test_a_users_failure_is_final_at_once(yard: Yard, place: Workplace) -> None:
    job = yard.submit(ring=False, **SHARDED)
    assert attempt(place, job, failing(MergeyardError("source_not_finite", "NaN in x"))) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.status is Status.FAILED and failed.attempt == 1 and yard.files(job) == []
    assert failed.error and failed.error["message"] == "NaN in x"


def test_a_source_that_vanished_fails_the_job(yard: Yard, place: Workplace) -> None:
    job = yard.submit(ring=False)
    (yard.settings.roots[0] / "json").rename(yard.settings.roots[0] / "gone")
    assert attempt(place, job) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.status is Status.FAILED and failed.error and failed.error["code"] == "source_not_found"


def test_a_cancel_is_confirmed_and_leaves_nothing(yard: Yard, place: Workplace) -> None:
    job = yard.submit(ring=False, **SHARDED)
    ending = attempt(place, job, lambda: yard.jobs.request_cancel(job.id))
    assert ending is Ending.CANCELLED, "at the latest, the publication is refused"
    assert yard.jobs.get(job.id).status is Status.CANCELLED and yard.files(job) == []


def test_an_attempt_that_lost_its_lease_writes_nothing_and_deletes_its_files(yard: Yard, place: Workplace) -> None:
    job = yard.submit(ring=False, **SHARDED)

    def lose() -> None:
        held = yard.jobs.get(job.id)
        yard.jobs.hand_back(job.id, held.lease_token or "")
        yard.jobs.claim(job.id, lease_seconds=60, process=1)

    assert attempt(place, job, lose) is Ending.LOST
    now = yard.jobs.get(job.id)
    assert now.status is Status.RUNNING and yard.processes(job)[-1] == 1
    assert yard.files(job) == sorted(shard.file.key for shard in yard.jobs.shards(job.id))


@pytest.mark.parametrize("row_is_gone", [False, True])
def test_a_late_attempt_of_a_deleted_merge_leaves_nothing(
    yard: Yard, place: Workplace, row_is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.records.upkeep.TOMBSTONE_SECONDS", -1.0)
    job = yard.submit(ring=False, **SHARDED)

    def lose() -> None:
        held = yard.jobs.get(job.id)
        yard.jobs.fail(job.id, held.lease_token or "", MergeyardError("worker_lost", "given up"), retry=False)
        yard.jobs.delete(job.id)
        if row_is_gone:
            Upkeep(yard.jobs.database).set_swept(job.id)

    assert attempt(place, job, lose) is Ending.LOST
    assert yard.files(job) == []
    assert Upkeep(yard.jobs.database).unswept() == []


def test_a_publication_whose_answer_was_lost_keeps_its_files(yard: Yard, place: Workplace) -> None:
    """The commit went through and its confirmation did not: the row names the files, so they must stay."""
    job = yard.submit(ring=False)
    real = yard.jobs.publish
    answers = iter([MergeyardError("database_unavailable", "connection lost")])

    class Losing(type(yard.jobs)):  # type: ignore[misc]
        def publish(self, *arguments: Any, **options: Any) -> Job:
            published = real(*arguments, **options)
            for error in answers:
                raise error
            return published

    place = replace(place, jobs=Losing(yard.jobs.database))
    assert attempt(place, job) is Ending.LOST
    done = yard.jobs.get(job.id)
    assert done.status is Status.SUCCEEDED and done.artifact
    assert yard.files(job) == sorted(file["key"] for file in done.artifact["files"])


def test_a_database_that_is_away_for_a_moment_costs_neither_the_attempt_nor_a_shard(
    yard: Yard, place: Workplace
) -> None:
    job = yard.submit(ring=False, **SHARDED)
    writes: list[str] = []

    class Flickering(type(yard.jobs)):  # type: ignore[misc]
        def set_stage(self, job_id: str, token: str, stage: Any) -> Job:
            self.flicker(f"stage {stage}")
            return super().set_stage(job_id, token, stage)  # type: ignore[no-any-return]

        def record_shard(self, job_id: str, token: str, file: StoredFile, statistics: Any) -> None:
            self.flicker("shard")
            super().record_shard(job_id, token, file, statistics)

        def shards(self, job_id: str) -> Sequence[Shard]:
            self.flicker("read")
            return super().shards(job_id)  # type: ignore[no-any-return]

        def flicker(self, write: str) -> None:
            writes.append(write)
            if writes.count(write) == 1:
                raise MergeyardError("database_unavailable", "away")

    assert attempt(replace(place, jobs=Flickering(yard.jobs.database)), job) is Ending.PUBLISHED
    assert {"stage merging", "shard", "read"} <= set(writes)
    assert yard.jobs.get(job.id).attempt == 1
    assert len({shard.file.name for shard in yard.jobs.shards(job.id)}) == writes.count("shard") - 1


def test_a_stop_request_hands_the_job_back_even_without_a_broker(yard: Yard, place: Workplace) -> None:
    job, stop = yard.submit(ring=False, **SHARDED), StopRequest()

    def ask() -> None:
        stop.made = True

    slow = replace(place, kernels=Interrupting(ask))  # type: ignore[arg-type]
    assert work(slow, job.id, stop) is Ending.HANDED_BACK
    back = yard.jobs.get(job.id)
    assert (back.status, back.attempt) == (Status.QUEUED, 0)


def test_a_stop_request_is_heard_while_finished_shards_are_read_again(
    yard: Yard, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stop = yard.submit(ring=False, **SHARDED), StopRequest()
    attempt(place, job, failing(ZeroDivisionError()))
    assert len(yard.jobs.shards(job.id)) > 1
    real, begun = yard.store.sha256, []

    def stopped(key: str, check: Callable[[], None]) -> str:
        begun.append(key)
        stop.made = True
        return real(key, check)

    monkeypatch.setattr(yard.store, "sha256", stopped)
    assert work(place, job.id, stop) is Ending.HANDED_BACK
    assert len(begun) == 1


def test_a_merge_without_room_waits_while_smaller_ones_go_on(
    yard: Yard, place: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = yard.submit(ring=False, out_dtype="bfloat16"), yard.submit(ring=False, out_dtype="float32")
    assert small.reserved_bytes < large.reserved_bytes
    place = replace(place, settings=place.settings.model_copy(update={"room_seconds": 0.01}))
    with monkeypatch.context() as patched:
        patched.setattr(yard.store, "free", lambda: small.reserved_bytes)
        for _ in range(2):
            assert attempt(place, large, failing(AssertionError("it began")), count=1) is Ending.NO_ROOM
        assert attempt(place, small) is Ending.PUBLISHED
    waiting = yard.jobs.get(large.id)
    assert (waiting.status, waiting.attempt, waiting.waits_for) == (Status.QUEUED, 0, "disk")
    assert yard.kinds(large) == ["submitted", "waiting_for_disk"], "told once"
    assert f"needs {large.reserved_bytes} bytes, and the store has {small.reserved_bytes} left" in caplog.text
    yard.until(lambda: attempt(place, large) is Ending.PUBLISHED)
    done = yard.jobs.get(large.id)
    assert (done.waits_for, done.attempt) == (None, 1)


def test_a_merge_that_would_take_what_must_stay_free_leaves_nothing_and_is_tried_again(
    yard: Yard, place: Workplace
) -> None:
    job = yard.submit(ring=False, max_attempts=2, **SHARDED)
    real = yard.store.free()
    assert real is not None

    def fill() -> None:  # somebody else's files, while this merge is on its way
        yard.store.keep_free = real + (1 << 40)

    assert attempt(place, job, fill) is Ending.FAILED
    back = yard.jobs.get(job.id)
    assert back.status is Status.QUEUED and back.failures[-1]["code"] == "disk_full"
    assert "must stay free" in back.failures[-1]["message"]
    kept = sorted(shard.file.key for shard in yard.jobs.shards(job.id))
    assert yard.files(job) == kept, "only what a retry can use stays"
    assert attempt(place, job) is Ending.NO_ROOM, "which waits for room, and costs no attempt"
    assert yard.jobs.get(job.id).attempt == 1


def test_a_disk_that_is_full_when_a_file_begins_fails_the_job(
    yard: Yard, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    job = yard.submit(ring=False, max_attempts=1)
    assert attempt(place, job) is Ending.FAILED
    failed = yard.jobs.get(job.id)
    assert failed.error and failed.error["code"] == "disk_full" and yard.files(job) == []


def test_a_source_that_belongs_to_another_owner_is_not_found_by_the_worker_either(
    yard: Yard, place: Workplace, tiny_models: Path
) -> None:
    draft = UploadStore(yard.settings.uploads).begin()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        draft.add(name, [(tiny_models / "sql" / name).read_bytes()])
    upload = draft.check()
    draft.commit(upload)
    OwnedUploads(yard.jobs.database).add(upload, by=Caller(owner="alice"))
    merged = yard.submit(ring=False, owner="alice")
    assert attempt(place, merged) is Ending.PUBLISHED
    for changes in ({"base_model": f"merge:{merged.id}"}, {"models": [{"adapter": upload.reference}]}):
        hers = yard.submit(ring=False, owner="alice", **changes)
        assert attempt(place, hers) is Ending.PUBLISHED
        # As if the API had let it through: the worker must not rely on that.
        copied = {name: getattr(hers, name) for name in ("recipe", "resolved", "method", "plan_digest", "estimates")}
        his, _ = yard.jobs.submit(NewJob(**copied, total_bytes=hers.total_bytes, owner="bob"))
        assert attempt(place, his) is Ending.FAILED
        failed = yard.jobs.get(his.id)
        assert failed.error and failed.error["code"] == "source_not_found"
