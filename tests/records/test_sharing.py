"""Artifacts that several merges have: how long they last, who is told, and what becomes of races, on both databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.artifacts.store import LocalStore
from app.errors import MergeyardError
from app.records.aliases import Aliases
from app.records.audit import Audit
from app.records.database import Database
from app.records.janitor import Janitor
from app.records.job import Idempotency, Job, Status
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.quotas import Limits, Quotas
from app.records.tables import artifacts, merge_sources
from app.records.tables import jobs as job_rows
from app.records.tally import Tally
from app.records.upkeep import Upkeep
from tests.records.submitting import claimed, new_job, wait_a_moment
from tests.records.test_aliases import at_once
from tests.records.test_upkeep import Nobody, lap, late, write

KEY = "e" * 64
ME = Caller(owner="me")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def published(jobs: Jobs, store: LocalStore, **changes: Any) -> Job:
    """A merge with one file of 4 bytes in the store."""
    job = claimed(jobs, **({"owner": "me"} | changes))
    key = f"{job.id}/{job.lease_token}/model.safetensors"
    write(store, key)
    file = {"name": "model.safetensors", "key": key, "size": 4, "sha256": "0" * 64}
    artifact = {"manifest_key": key, "manifest_sha256": "a" * 64, "size": 4, "files": [file]}
    return jobs.publish(job.id, job.lease_token or "", artifact, reuse_key=KEY)


def again(jobs: Jobs, **changes: Any) -> Job:
    """The same merge, as the API submits it."""
    new = new_job(**({"owner": "me", "reuse_key": KEY} | changes))
    maker = jobs.reusable(new)
    return jobs.submit(new, reuse=maker.id if maker else None, by=ME)[0]


def files(store: LocalStore, job: Job) -> int:
    return len(list(store.keys(job.id)))


def test_an_equal_merge_has_the_same_artifact_at_once(jobs: Jobs, store: LocalStore) -> None:
    first = published(jobs, store)
    second = again(jobs)
    assert (second.status, second.reused, first.reused) == (Status.SUCCEEDED, True, False)
    assert second.artifact == first.artifact and second.id != first.id and second.finished_at
    assert [event.type for event in jobs.events(second.id)] == ["submitted", "reused", "succeeded"]
    assert jobs.claim(second.id, lease_seconds=60) is None
    assert [entry.action for entry in Audit(jobs.database).list()] == ["submitted"]
    with pytest.raises(MergeyardError, match="already succeeded"):
        jobs.request_cancel(second.id)


def test_what_is_reused_is_reused_again_and_counted_by_itself(jobs: Jobs, store: LocalStore) -> None:
    published(jobs, store)
    assert [again(jobs).reused for _ in range(2)] == [True, True]
    tally = Tally(jobs.database)
    tally.count()
    totals = tally.totals()
    assert totals.counts["finished"] == {"succeeded": 1, "reused": 2}
    assert totals.counts["published_bytes"] == {"": 4} and totals.counts["submitted"] == {"": 3}
    assert totals.stages["queued"].at_most[-1] == 1, "nobody waited for what was there"


@pytest.mark.parametrize("changes", [{"owner": "you"}, {"reuse_key": "f" * 64}, {"reuse_key": None}])
def test_another_owners_or_another_merge_is_not_reused(jobs: Jobs, store: LocalStore, changes: dict[str, Any]) -> None:
    first = published(jobs, store)
    assert again(jobs, **changes).status is Status.QUEUED
    if changes.get("owner"):
        stolen, _ = jobs.submit(new_job(**changes), reuse=first.id)
        assert stolen.status is Status.QUEUED, "not even by its id"


def test_an_idempotency_key_gives_the_reused_merge_again(jobs: Jobs, store: LocalStore) -> None:
    first, key = published(jobs, store), Idempotency(owner="me", key="k", request_hash="1" * 64)
    new = new_job(owner="me", reuse_key=KEY)
    made, created = jobs.submit(new, idempotency=key, reuse=first.id)
    repeated, created_again = jobs.submit(new, idempotency=key, reuse=first.id)
    assert (created, created_again) == (True, False)
    assert repeated == made == jobs.earlier(key) and made.reused


def test_files_go_with_the_last_merge_that_has_them(jobs: Jobs, store: LocalStore) -> None:
    first = published(jobs, store)
    second, third = again(jobs), again(jobs)
    quotas = Quotas(jobs.database)
    for job in (second, first):  # the one that made it is not the last
        jobs.delete(job.id)
        lap(jobs, store)
        assert files(store, first) == 1 and quotas.of_owner("me").artifacts == 4
    assert again(jobs).reused, "a deleted merge's artifact that somebody has is as good as any"
    for job in jobs.list().jobs:
        jobs.delete(job.id)
    assert third.artifact_id == first.id and quotas.of_owner("me").artifacts == 0
    lap(jobs, store)
    assert files(store, first) == 0
    assert again(jobs).status is Status.QUEUED


def test_a_shared_folder_is_swept_of_strays_alone_however_long_ago_its_merge_was_deleted(
    jobs: Jobs, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = published(jobs, store)
    again(jobs)
    jobs.delete(first.id)
    lap(jobs, store)
    late(jobs, store, first)
    assert files(store, first) == 2
    monkeypatch.setattr("app.records.upkeep.TOMBSTONE_SECONDS", -1.0)
    for _ in range(2):
        lap(jobs, store)
    claims = Upkeep(jobs.database).claims(first.id)
    assert claims is not None and set(store.keys(first.id)) == claims.keys == first.artifact_keys
    jobs.delete(jobs.list().jobs[0].id)
    lap(jobs, store)
    assert files(store, first) == 0 and Upkeep(jobs.database).claims(first.id) is None


def test_a_reused_result_takes_no_room(jobs: Jobs, store: LocalStore) -> None:
    first = published(jobs, store)
    nothing_left = Limits(owner_bytes=4, owner_jobs=0, store_bytes=4, free=lambda: 0)
    new = new_job(owner="me", reuse_key=KEY)
    assert jobs.submit(new, reuse=first.id, limits=nothing_left)[0].reused
    assert Quotas(jobs.database).of_owner("me").total == 4
    with pytest.raises(MergeyardError):
        jobs.submit(new, limits=nothing_left)


def test_reuse_and_the_deletion_of_the_only_holder_at_once_both_end_well(jobs: Jobs, store: LocalStore) -> None:
    for number in range(12):
        first = published(jobs, store)
        new = new_job(owner="me", reuse_key=KEY)
        calls = [
            lambda new=new, first=first: jobs.submit(new, reuse=first.id)[0],
            lambda job=first: jobs.delete(job.id),
        ]
        made, _ = at_once(*calls) if number % 2 else reversed(at_once(*reversed(calls)))
        assert isinstance(made, Job)
        Janitor(jobs, Nobody(), interval=60, store=store).round()  # type: ignore[arg-type]
        assert files(store, first) == (1 if made.reused else 0), "what is answered is there"
        assert made.reused or made.status is Status.QUEUED
        if made.reused:
            jobs.delete(made.id)
    assert Quotas(jobs.database).of_owner("me").artifacts == 0


def test_an_artifact_that_went_since_it_was_looked_up_is_made_anew(jobs: Jobs, store: LocalStore) -> None:
    first = published(jobs, store)
    jobs.delete(first.id)
    job, created = jobs.submit(new_job(owner="me", reuse_key=KEY), reuse=first.id)
    assert created and (job.status, job.artifact) == (Status.QUEUED, None)


def test_a_merge_that_an_unfinished_one_reads_is_not_deleted(jobs: Jobs, store: LocalStore) -> None:
    read = published(jobs, store)
    reader, _ = jobs.submit(new_job(owner="me", merges=[read.id]))
    for claim in (None, jobs.claim):
        running = claim(reader.id, lease_seconds=60) if claim else None
        with pytest.raises(MergeyardError, match=reader.id) as refused:
            jobs.delete(read.id)
        assert refused.value.code == "merge_in_use"
    assert running is not None
    jobs.fail(reader.id, running.lease_token or "", MergeyardError("source_not_finite", "x"), retry=False)
    jobs.delete(read.id)
    with jobs.database.read() as connection:
        assert connection.scalars(select(merge_sources.c.merge)).all() == [read.id], "what it was made of stays known"


def test_a_merge_is_deleted_or_read_and_never_both(jobs: Jobs, store: LocalStore) -> None:
    for number in range(12):
        read = published(jobs, store)
        new = new_job(owner="me", merges=[read.id])
        calls = [lambda new=new: jobs.submit(new)[0], lambda read=read: jobs.delete(read.id)]
        made, deleted = at_once(*calls) if number % 2 else reversed(at_once(*reversed(calls)))
        assert (made == "source_not_found") != (deleted == "merge_in_use")


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


def grow_old(database: Database) -> None:
    """All merges that expire at all have expired."""
    wait_a_moment(database)
    with database.write() as connection:
        rows = update(job_rows).where(job_rows.c.expires_at.is_not(None))
        connection.execute(rows.values(expires_at=job_rows.c.created_at))


def left(jobs: Jobs) -> set[str]:
    return {job.id for job in jobs.list().jobs}


def test_a_merge_expires_its_time_after_its_success_and_not_before(jobs: Jobs, store: LocalStore) -> None:
    job = published(jobs, store, expires_in=60)
    assert job.expires_at and job.finished_at and (job.expires_at - job.finished_at).total_seconds() == 60
    lap(jobs, store)
    assert files(store, job) == 1
    grow_old(jobs.database)
    lap(jobs, store)
    assert left(jobs) == set() and files(store, job) == 0
    (entry,) = Audit(jobs.database).list()
    assert (entry.action, entry.owner, entry.subject, entry.data) == (
        "expired", "service:janitor", job.id, {"owner": "me"},
    )  # fmt: skip
    tally = Tally(jobs.database)
    tally.count()
    assert tally.totals().counts["expired"] == {"": 1}


def test_only_what_is_over_and_nobody_needs_expires(jobs: Jobs, store: LocalStore) -> None:
    pinned = published(jobs, store, expires_in=60, pinned=True)
    lasting = published(jobs, store)
    aliased, read, over = (published(jobs, store, expires_in=60) for _ in range(3))
    waiting, _ = jobs.submit(new_job(owner="me", expires_in=60))
    Aliases(jobs.database).point("production", aliased.id, by=ME)
    reader, _ = jobs.submit(new_job(owner="me", merges=[read.id]))
    grow_old(jobs.database)
    upkeep = Upkeep(jobs.database)
    assert [job.id for job in upkeep.expire()] == [over.id]
    assert left(jobs) == {pinned.id, lasting.id, aliased.id, read.id, waiting.id, reader.id}
    Aliases(jobs.database).delete("production", by=ME)
    jobs.request_cancel(reader.id)
    assert {job.id for job in upkeep.expire()} == {aliased.id, read.id}, "once nobody needs them any more"


def test_a_shared_artifact_outlives_the_merge_that_expires(jobs: Jobs, store: LocalStore) -> None:
    first = published(jobs, store, expires_in=60)
    second = again(jobs)
    grow_old(jobs.database)
    lap(jobs, store)
    assert left(jobs) == {second.id} and files(store, first) == 1
    assert second.expires_at is None, "a reused result has its own time"
    timed = again(jobs, expires_in=60)
    assert timed.expires_at and timed.finished_at and (timed.expires_at - timed.finished_at).total_seconds() == 60


def test_many_janitors_at_once_expire_a_merge_once(jobs: Jobs, store: LocalStore) -> None:
    made = [published(jobs, store, expires_in=60) for _ in range(5)]
    grow_old(jobs.database)
    found = at_once(*[Upkeep(jobs.database).expire for _ in range(4)])
    expired = [job.id for answer in found for job in answer]  # type: ignore[attr-defined]
    assert sorted(expired) == sorted(job.id for job in made)
    with jobs.database.read() as connection:
        assert connection.execute(select(artifacts)).all() == []
