"""What is kept and reserved, and that nobody slips past a limit, on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from alembic import command
from sqlalchemy import event, text, update

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.database import Database, clock, migrations_config
from app.records.job import NoRoom, Status
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.owned import OwnedUploads
from app.records.quotas import Limits, Quotas
from app.records.tables import jobs as table
from app.records.tables import usage
from app.records.upkeep import Upkeep
from app.sources.uploads import Upload, UploadedFile
from tests.records.submitting import ARTIFACT, claimed, new_job, wait_a_moment

FAILURE = MergeyardError("internal", "x")


@pytest.fixture
def quotas(database: Database) -> Quotas:
    return Quotas(database)


def upload(size: int, digest: str = "0") -> Upload:
    return Upload(
        digest=digest * 64, kind="model", files=(UploadedFile(name="a.safetensors", size=size, sha256="0" * 64),)
    )


def publish(jobs: Jobs, size: int, **changes: Any) -> str:
    job = claimed(jobs, **changes)
    jobs.publish(job.id, job.lease_token or "", {**ARTIFACT, "size": size})
    return job.id


def refusal(act: Callable[[], object]) -> MergeyardError:
    with pytest.raises(MergeyardError) as caught:
        act()
    return caught.value


def at_once(acts: list[Callable[[], object]]) -> list[object]:
    """What each gave or raised, all of them begun together."""
    start, found = threading.Barrier(len(acts)), []

    def run(act: Callable[[], object]) -> None:
        start.wait()
        try:
            found.append(act())
        except (MergeyardError, NoRoom) as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def codes(found: list[object]) -> list[str]:
    return [one.code for one in found if isinstance(one, MergeyardError)]


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (lambda jobs, job: jobs.publish(job.id, job.lease_token, {**ARTIFACT, "size": 70}), 70),
        (lambda jobs, job: jobs.fail(job.id, job.lease_token, FAILURE, retry=False), 0),
        (lambda jobs, job: [jobs.request_cancel(job.id), jobs.confirm_cancelled(job.id, job.lease_token)], 0),
    ],
    ids=["published", "failed", "cancelled"],
)
def test_a_job_reserves_until_it_ends_however_it_does(
    jobs: Jobs, quotas: Quotas, end: Callable[[Jobs, Any], object], kept: int
) -> None:
    job, _ = jobs.submit(new_job(owner="alice"))
    assert quotas.of_owner("alice").reserved == quotas.of_all().reserved == 100
    running = jobs.claim(job.id, lease_seconds=60)
    assert running is not None
    jobs.fail(job.id, running.lease_token or "", FAILURE, retry=True)
    assert quotas.of_owner("alice").reserved == 100, "what is tried again still needs it"
    end(jobs, jobs.claim(job.id, lease_seconds=60))
    found = quotas.of_owner("alice")
    assert (found.reserved, found.unfinished, found.artifacts) == (0, 0, kept)


def test_a_deleted_artifact_counts_no_more(jobs: Jobs, quotas: Quotas) -> None:
    first, _ = publish(jobs, 30, owner="alice"), publish(jobs, 12, owner="alice")
    publish(jobs, 1, owner="bob")
    assert (quotas.of_owner("alice").artifacts, quotas.of_all().artifacts) == (42, 43)
    jobs.delete(first)
    assert (quotas.of_owner("alice").artifacts, quotas.of_all().artifacts) == (12, 13)


def test_an_upload_counts_for_everybody_who_sent_it_and_once_in_the_store(database: Database, quotas: Quotas) -> None:
    uploads = OwnedUploads(database)
    for owner in ("alice", "bob", "alice"):
        uploads.add(upload(50), by=Caller(owner=owner))
    uploads.add(upload(7, "1"), by=Caller(owner="bob"))
    assert (quotas.of_owner("alice").uploads, quotas.of_owner("bob").uploads, quotas.of_all().uploads) == (50, 57, 57)


def test_an_owner_over_quota_is_told_the_numbers_and_others_go_on(jobs: Jobs, database: Database) -> None:
    publish(jobs, 500, owner="alice")
    OwnedUploads(database).add(upload(300), by=Caller(owner="alice"))
    limits = Limits(owner_bytes=1000)
    jobs.submit(new_job(owner="alice", total_bytes=150), limits=limits)
    error = refusal(lambda: jobs.submit(new_job(owner="alice", total_bytes=51), limits=limits))
    assert (error.code, error.status) == ("over_quota", 413)
    for number in (
        "51 bytes",
        "1000",
        "950 bytes",
        "500 of artifacts",
        "300 of uploads",
        "150 reserved by 1 unfinished",
    ):
        assert number in error.message
    jobs.submit(new_job(owner="alice", total_bytes=50), limits=limits)
    jobs.submit(new_job(owner="bob", total_bytes=1000), limits=limits)
    assert refusal(
        lambda: OwnedUploads(database).add(upload(1, "1"), by=Caller(owner="alice"), limits=limits)
    ).code == ("over_quota")
    assert not OwnedUploads(database).has("alice", "1" * 64)


def test_the_whole_service_has_a_quota_too(jobs: Jobs, database: Database) -> None:
    publish(jobs, 500, owner="alice")
    limits = Limits(store_bytes=1000)
    jobs.submit(new_job(owner="bob", total_bytes=500), limits=limits)
    error = refusal(lambda: jobs.submit(new_job(owner="carol", total_bytes=1), limits=limits))
    assert (error.code, error.status) == ("storage_full", 507) and "1000" in error.message
    assert refusal(lambda: OwnedUploads(database).add(upload(1), by=Caller(owner="dan"), limits=limits)).code == (
        "storage_full"
    )


def test_what_is_free_and_promised_to_nobody_is_what_a_merge_may_take(jobs: Jobs) -> None:
    free = 250
    limits = Limits(free=lambda: free)
    running = claimed(jobs, total_bytes=200)
    assert refusal(lambda: jobs.submit(new_job(total_bytes=51), limits=limits)).code == "storage_full"
    jobs.submit(new_job(total_bytes=50), limits=limits)
    free = 100  # the running one has written 150 of its bytes
    _record(jobs, running, 150)
    assert refusal(lambda: jobs.submit(new_job(total_bytes=1), limits=limits)).code == "storage_full"
    free = 101
    jobs.submit(new_job(total_bytes=1), limits=limits)
    jobs.submit(new_job(total_bytes=10**15), limits=Limits(free=lambda: None))  # object storage has no end
    jobs.submit(new_job(total_bytes=10**15), limits=Limits(free=_unreachable))  # the worker will see


def test_an_owner_has_only_so_many_unfinished_merges(jobs: Jobs) -> None:
    limits = Limits(owner_jobs=2)
    first, _ = jobs.submit(new_job(owner="alice"), limits=limits)
    jobs.submit(new_job(owner="alice"), limits=limits)
    error = refusal(lambda: jobs.submit(new_job(owner="alice"), limits=limits))
    assert (error.code, error.status) == ("too_many_jobs", 429) and "may have 2" in error.message
    jobs.submit(new_job(owner="bob"), limits=limits)
    jobs.request_cancel(first.id)
    jobs.submit(new_job(owner="alice"), limits=limits)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(owner_bytes=350), "over_quota"),
        (Limits(store_bytes=350), "storage_full"),
        (Limits(free=lambda: 350), "storage_full"),
        (Limits(owner_jobs=3), "too_many_jobs"),
    ],
    ids=["owner", "store", "free", "jobs"],
)
def test_of_many_submissions_at_once_only_those_get_in_that_have_room(
    jobs: Jobs, quotas: Quotas, limits: Limits, code: str
) -> None:
    found = at_once([lambda: jobs.submit(new_job(owner="alice"), limits=limits)] * 8)
    assert codes(found) == [code] * 5
    assert quotas.of_owner("alice").reserved == 300


def test_merges_and_uploads_at_once_share_the_room(jobs: Jobs, database: Database, quotas: Quotas) -> None:
    limits, uploads = Limits(owner_bytes=350), OwnedUploads(database)
    acts: list[Callable[[], object]] = [lambda: jobs.submit(new_job(owner="alice"), limits=limits)] * 4
    for digest in "1234":
        acts.append(lambda digest=digest: uploads.add(upload(100, digest), by=Caller(owner="alice"), limits=limits))
    assert codes(at_once(acts)) == ["over_quota"] * 5
    assert quotas.of_owner("alice").total == 300


def test_of_many_workers_at_once_only_those_begin_that_have_room(jobs: Jobs) -> None:
    waiting = [jobs.submit(new_job())[0].id for _ in range(8)]
    found = at_once([lambda id=id: jobs.claim(id, lease_seconds=60, free=lambda: 350) for id in waiting])
    assert sum(isinstance(one, NoRoom) for one in found) == 5
    assert sum(job.status is Status.RUNNING for job in map(jobs.get, waiting)) == 3


def test_what_an_attempt_has_finished_needs_no_room_again(jobs: Jobs) -> None:
    job = claimed(jobs)
    _record(jobs, job, 60)
    with pytest.raises(NoRoom) as lacking:
        jobs.claim(jobs.submit(new_job())[0].id, lease_seconds=60, free=lambda: 139)
    assert (lacking.value.needs, lacking.value.free) == (100, 99), "40 are still to come of the running one"
    jobs.hand_back(job.id, job.lease_token or "")
    assert jobs.claim(job.id, lease_seconds=60, free=lambda: 40) is not None


def test_a_job_without_room_is_left_alone_for_its_pause_and_then_rung_for(jobs: Jobs) -> None:
    upkeep = Upkeep(jobs.database)
    large, _ = jobs.submit(new_job(total_bytes=1000))
    with pytest.raises(NoRoom) as lacking:
        jobs.claim(large.id, lease_seconds=60, free=lambda: 999)
    assert jobs.get(large.id) == large, "nothing was claimed"
    jobs.wait_for_disk(large.id, lacking.value, pause=60)
    assert jobs.get(large.id).waits_for == "disk"
    assert upkeep.waiting("default") == 0 and upkeep.round(ring_after=0).ring == ()
    assert jobs.claim(large.id, lease_seconds=60) is None, "a doorbell that comes again is not answered"
    _over(jobs, large.id)
    assert [ring.id for ring in upkeep.round(ring_after=3600).ring] == [large.id]
    claimed_now = jobs.claim(large.id, lease_seconds=60, free=lambda: 1000)
    assert claimed_now is not None and claimed_now.waits_for is None


def test_waiting_for_room_shortens_no_pause_after_a_failure(database: Database) -> None:
    jobs = Jobs(database, retry_seconds=200)
    job = claimed(jobs)
    paused = jobs.fail(job.id, job.lease_token or "", FAILURE, retry=True)
    with pytest.raises(NoRoom) as lacking:
        jobs.claim(job.id, lease_seconds=60, free=lambda: 0)
    jobs.wait_for_disk(job.id, lacking.value, pause=1)
    assert jobs.get(job.id).retry_at == paused.retry_at


def test_a_cancel_ends_the_wait_for_room(jobs: Jobs) -> None:
    job, _ = jobs.submit(new_job())
    jobs.wait_for_disk(job.id, NoRoom(job.id, needs=2, free=1), pause=60)
    assert jobs.request_cancel(job.id).waits_for is None
    jobs.wait_for_disk(job.id, NoRoom(job.id, needs=2, free=1), pause=60)
    assert jobs.get(job.id).waits_for is None, "a worker that is late changes nothing"


def test_sums_that_somebody_broke_are_mended_while_jobs_come_and_go(jobs: Jobs, quotas: Quotas) -> None:
    publish(jobs, 5, owner="alice")
    kept = [jobs.submit(new_job(owner=owner))[0] for owner in ("alice", "alice", "bob")]
    ending = [jobs.submit(new_job(owner="alice"))[0] for _ in range(4)]
    assert not quotas.recount(), "they were right"
    with jobs.database.write() as connection:
        connection.execute(update(usage).values(reserved_bytes=7_000_000, unfinished=7))
    acts: list[Callable[[], object]] = [lambda job=job: jobs.request_cancel(job.id) for job in ending]
    mended = at_once([*acts, quotas.recount, lambda: jobs.submit(new_job(owner="alice"))])
    assert True in mended
    found = quotas.of_owner("alice")
    assert (found.reserved, found.unfinished, found.artifacts) == (300, 3, 5)
    assert quotas.of_owner("bob").reserved == kept[2].reserved_bytes
    assert not quotas.recount()


def test_sums_are_mended_after_a_change_that_is_not_committed_yet(jobs: Jobs, quotas: Quotas) -> None:
    database = jobs.database
    stays, ends = (jobs.submit(new_job(owner="alice"))[0] for _ in range(2))
    with database.write() as connection:
        connection.execute(update(usage).values(reserved_bytes=7_000_000, unfinished=7))
    reached, go_on, recounting = threading.Event(), threading.Event(), threading.Event()
    cancelling = threading.Thread(target=lambda: jobs.request_cancel(ends.id))

    def recount() -> None:
        recounting.set()
        quotas.recount()

    def before_commit(_: object) -> None:
        if threading.current_thread() is cancelling:
            reached.set()
            assert go_on.wait(10)

    mending = threading.Thread(target=recount)
    event.listen(database.engine, "commit", before_commit)
    try:
        cancelling.start()
        assert reached.wait(10)
        mending.start()
        assert recounting.wait(10)
        wait_until_blocked(database)
    finally:
        go_on.set()
        cancelling.join()
        mending.join()
        event.remove(database.engine, "commit", before_commit)
    found = quotas.of_owner("alice")
    assert (found.reserved, found.unfinished) == (stays.reserved_bytes, 1)


def wait_until_blocked(database: Database) -> None:
    """Until a transaction waits for another's lock; on SQLite, where nobody tells, for a moment."""
    if database.dialect == "sqlite":
        wait_a_moment(database)
        return
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 10
    while True:
        with database.read() as connection:
            if connection.scalar(waiting):
                return
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.01)


def test_unfinished_jobs_are_added_up_from_an_index_of_their_own(database: Database, jobs: Jobs) -> None:
    publish(jobs, 1, owner="alice")
    sums = "SELECT owner, sum(reserved_bytes), count(*) FROM jobs WHERE finished_at IS NULL GROUP BY owner"
    with database.write() as connection:
        explain = "EXPLAIN QUERY PLAN" if database.dialect == "sqlite" else "EXPLAIN"
        if database.dialect == "postgresql":
            connection.execute(text("SET LOCAL enable_seqscan = off"))
        told = str(connection.execute(text(f"{explain} {sums}")).all())
        assert "ix_jobs_reserved" in told, told
        held = "SELECT sum(reserved_bytes) FROM jobs WHERE status IN ('running') AND lease_token IS NOT NULL"
        told = str(connection.execute(text(f"{explain} {held}")).all())
        assert "ix_jobs_" in told and "SCAN" not in told, told


def test_what_was_there_before_the_migration_counts(jobs: Jobs, quotas: Quotas, database: Database) -> None:
    publish(jobs, 3_000_000_000, owner="alice")
    jobs.delete(publish(jobs, 5, owner="alice"))
    jobs.submit(new_job(owner="alice", total_bytes=5_000_000_000))
    before = quotas.of_owner("alice")
    assert (before.artifacts, before.reserved, before.unfinished) == (3_000_000_000, 5_000_000_000, 1)
    for step, revision in ((command.downgrade, "0006"), (command.upgrade, "head")):
        config = migrations_config()
        with database.write() as connection:
            config.attributes["connection"] = connection
            step(config, revision)
    assert quotas.of_owner("alice") == before


def _record(jobs: Jobs, job: Any, size: int) -> None:
    jobs.record_shard(job.id, job.lease_token, StoredFile(name="a", key="a", size=size, sha256="0" * 64), {})


def _over(jobs: Jobs, job_id: str) -> None:
    """The pause is over."""
    wait_a_moment(jobs.database)
    with jobs.database.write() as connection:
        connection.execute(update(table).where(table.c.id == job_id).values(retry_at=clock(connection)))


def _unreachable() -> int:
    raise OSError("stale file handle")
