"""The janitor's cases, on both databases; its rings; and its sweeping."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from app.artifacts.manifest import StoredFile
from app.artifacts.store import LocalStore
from app.errors import MergeyardError
from app.records.bell import Bell
from app.records.database import Database
from app.records.janitor import Janitor
from app.records.job import JanitorReport, Job, Status
from app.records.jobs import Jobs
from app.records.upkeep import Upkeep
from app.sources.uploads import UploadStore
from tests.records.submitting import claimed, new_job, wait_a_moment

NOTHING = JanitorReport(ring=(), requeued=(), failed=(), cancelled=())


@pytest.fixture
def upkeep(database: Database) -> Upkeep:
    return Upkeep(database)


def kinds(jobs: Jobs, job: Job) -> list[str]:
    return [event.type for event in jobs.events(job.id)]


def test_a_dead_lease_goes_back_to_the_queue_while_attempts_remain(jobs: Jobs, upkeep: Upkeep) -> None:
    job = claimed(jobs, lease_seconds=0.01, max_attempts=2, queue="q", priority=1)
    time.sleep(0.05)
    report = upkeep.round()
    assert report.requeued == (job.id,) and [(ring.id, ring.queue, ring.priority) for ring in report.ring] == [
        (job.id, "q", 1)
    ]
    back = jobs.get(job.id)
    assert (back.status, back.attempt, back.lease_token) == (Status.QUEUED, 1, None)
    assert kinds(jobs, job) == ["submitted", "claimed", "worker_lost"]
    assert upkeep.round() == NOTHING, "a second round finds nothing to do"


def test_a_dead_lease_without_attempts_fails_with_worker_lost(jobs: Jobs, upkeep: Upkeep) -> None:
    job = claimed(jobs, lease_seconds=0.01, max_attempts=1)
    time.sleep(0.05)
    assert upkeep.round().failed == (job.id,)
    failed = jobs.get(job.id)
    assert failed.status is Status.FAILED and failed.error and failed.error["code"] == "worker_lost"
    assert kinds(jobs, job) == ["submitted", "claimed", "worker_lost", "failed"]


def test_a_stuck_cancelling_row_is_closed(jobs: Jobs, upkeep: Upkeep) -> None:
    job = claimed(jobs, lease_seconds=0.01)
    jobs.request_cancel(job.id)
    time.sleep(0.05)
    assert upkeep.round().cancelled == (job.id,)
    assert kinds(jobs, job) == ["submitted", "claimed", "cancel_requested", "worker_lost", "cancelled"]


def test_a_job_that_lives_but_does_not_move_is_taken_away(jobs: Jobs, upkeep: Upkeep) -> None:
    job = claimed(jobs)
    time.sleep(0.1)
    jobs.heartbeat(job.id, job.lease_token or "", lease_seconds=60, progress_bytes=0)
    assert upkeep.round(stalled_after=60) == NOTHING
    assert upkeep.round(stalled_after=0.05).requeued == (job.id,)
    assert jobs.events(job.id)[-1].data == {"attempt": 1, "reason": "stalled"}


def test_the_janitor_takes_stalled_jobs_away_by_its_own_measure(jobs: Jobs) -> None:
    job = claimed(jobs)
    time.sleep(0.1)
    patient, strict = (Janitor(jobs, Nobody(), 60, stalled_after=seconds) for seconds in (60, 0.05))  # type: ignore[arg-type]
    patient.round()
    assert jobs.get(job.id).status is Status.RUNNING
    strict.round()
    assert jobs.get(job.id).status is Status.QUEUED


def test_a_living_job_is_left_alone(jobs: Jobs, upkeep: Upkeep) -> None:
    job = claimed(jobs)
    assert upkeep.round(ring_after=0) == NOTHING
    assert jobs.get(job.id) == job


def test_a_queued_row_is_rung_again_once_it_is_stale(jobs: Jobs, upkeep: Upkeep) -> None:
    first, _ = jobs.submit(new_job())
    wait_a_moment(jobs.database)
    second, _ = jobs.submit(new_job())
    assert upkeep.round(ring_after=60) == NOTHING
    assert [ring.id for ring in upkeep.round(ring_after=0).ring] == [first.id, second.id]
    assert upkeep.round(ring_after=60) == NOTHING, "what was rung just now is not stale"


def test_a_queue_without_a_worker_does_not_keep_the_others_waiting(
    jobs: Jobs, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.records.upkeep.BATCH", 4)
    for _ in range(6):
        jobs.submit(new_job(queue="dead"))
    served = []
    for _ in range(2):
        served.append(jobs.submit(new_job(queue="served"))[0].id)
        wait_a_moment(jobs.database)
    report = upkeep.round(ring_after=0)
    assert len(report.ring) == 4
    assert [ring.id for ring in report.ring if ring.queue == "served"] == served


def test_every_job_of_a_long_queue_has_its_turn(jobs: Jobs, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.records.upkeep.BATCH", 2)
    waiting = [jobs.submit(new_job())[0].id for _ in range(5)]
    rung: list[str] = []
    for _ in range(3):
        rung += [ring.id for ring in upkeep.round(ring_after=0).ring]
        time.sleep(0.005)  # SQLite's clock counts milliseconds
    assert set(rung) == set(waiting)


def test_many_janitors_at_once_lose_a_worker_once(jobs: Jobs, upkeep: Upkeep) -> None:
    dead = [claimed(jobs, lease_seconds=0.01) for _ in range(5)]
    time.sleep(0.05)
    reports: list[JanitorReport] = []
    threads = [threading.Thread(target=lambda: reports.append(upkeep.round())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job_id for report in reports for job_id in report.requeued) == sorted(job.id for job in dead)
    for job in dead:
        assert kinds(jobs, job).count("worker_lost") == 1


def test_the_janitor_rings_for_what_no_doorbell_waits_for(sqlite_url: str, broker_url: str, queue: str) -> None:
    jobs, bell = Jobs(Database(sqlite_url)), Bell(broker_url)
    janitor = Janitor(jobs, bell, interval=0.01)
    for _ in range(3):
        jobs.submit(new_job(queue=queue))
    time.sleep(0.05)
    janitor.round()
    assert bell.waiting(queue) == 3
    time.sleep(0.05)
    janitor.round()
    assert bell.waiting(queue) == 3, "a long queue is not filled with repeats"
    bell.close()


def test_never_do_more_doorbells_wait_than_jobs(sqlite_url: str, broker_url: str, queue: str) -> None:
    """Not even where some are missing, so that one round after the other has a reason to ring."""
    jobs, bell = Jobs(Database(sqlite_url)), Bell(broker_url)
    janitor = Janitor(jobs, bell, interval=0.01)
    waiting = [jobs.submit(new_job(queue=queue, priority=number))[0] for number in range(6)]
    for job in waiting[:4]:
        bell.ring(job.id, queue)
    for _ in range(3):
        time.sleep(0.02)
        janitor.round()
        assert bell.waiting(queue) == 6
    jobs.claim(waiting[0].id, lease_seconds=60)
    time.sleep(0.02)
    janitor.round()
    assert bell.waiting(queue) == 6, "the doorbell of what was claimed is answered in its turn"
    bell.close()


def test_of_the_missing_doorbells_the_urgent_ones_are_pressed_first(sqlite_url: str) -> None:
    jobs, rung = Jobs(Database(sqlite_url)), Listener(waiting=2)
    janitor = Janitor(jobs, rung, interval=0.01)  # type: ignore[arg-type]
    submitted = {priority: jobs.submit(new_job(priority=priority))[0].id for priority in (0, -1, 5)}
    time.sleep(0.05)
    janitor.round()
    assert rung.ids == [submitted[5]]


class Listener:
    """A bell whose broker holds ``waiting`` doorbells already."""

    def __init__(self, waiting: int) -> None:
        self.ids: list[str] = []
        self._waiting = waiting

    def waiting(self, queue: str) -> int:
        return self._waiting

    def ring(self, job_id: str, queue: str, priority: int = 0) -> None:
        self.ids.append(job_id)


def test_a_broker_that_is_away_loses_no_job_and_answers_soon(sqlite_url: str, tmp_path: Path) -> None:
    jobs, bell = Jobs(Database(sqlite_url)), Bell(f"redis+socket://{tmp_path}/nobody.sock")
    job, _ = jobs.submit(new_job())
    for call in (lambda: bell.ring(job.id, job.queue), bell.check, lambda: bell.waiting(job.queue)):
        began = time.monotonic()
        with pytest.raises(MergeyardError) as caught:
            call()
        assert caught.value.code == "broker_unavailable" and time.monotonic() - began < 2
    with pytest.raises(MergeyardError):
        Janitor(jobs, bell, interval=0).round()
    assert jobs.get(job.id).status is Status.QUEUED


def test_the_thread_survives_rounds_that_fail(sqlite_url: str, tmp_path: Path) -> None:
    jobs = Jobs(Database(sqlite_url))
    janitor = Janitor(jobs, Bell(f"redis+socket://{tmp_path}/nobody.sock"), interval=0.02)
    job = claimed(jobs, lease_seconds=0.2)
    janitor.start()
    deadline = time.monotonic() + 10
    while jobs.get(job.id).status is Status.RUNNING and time.monotonic() < deadline:
        time.sleep(0.02)
    janitor.stop()
    assert jobs.get(job.id).status is Status.QUEUED


def write(store: LocalStore, key: str) -> None:
    with store.create(key) as writer:
        writer.write(b"data")


def test_sweeping_keeps_what_is_published_and_what_a_retry_can_use(
    sqlite_url: str, broker_url: str, tmp_path: Path
) -> None:
    jobs, store = Jobs(Database(sqlite_url)), LocalStore(tmp_path / "store")
    published, failed, retried, deleted = (claimed(jobs) for _ in range(4))
    for job in (published, failed, retried, deleted):
        for name in ("kept", "left"):
            write(store, f"{job.id}/{job.lease_token}/{name}")
    for job in (published, deleted):
        key = f"{job.id}/{job.lease_token}/kept"
        file = {"name": "kept", "key": key, "size": 4, "sha256": "0"}
        jobs.publish(job.id, job.lease_token or "", {"manifest_key": key, "files": [file]})
    jobs.fail(failed.id, failed.lease_token or "", MergeyardError("internal", "x"), retry=False)
    kept = StoredFile(name="kept", key=f"{retried.id}/{retried.lease_token}/kept", size=4, sha256="0")
    jobs.record_shard(retried.id, retried.lease_token or "", kept, {})
    jobs.delete(deleted.id)
    bell = Bell(broker_url)
    Janitor(jobs, bell, interval=60, store=store).round()
    bell.close()
    assert list(store.keys(published.id)) == [f"{published.id}/{published.lease_token}/kept"]
    assert len(list(store.keys(retried.id))) == 2, "a running attempt's files are its own"
    assert list(store.keys(failed.id)) == list(store.keys(deleted.id)) == []
    assert Upkeep(jobs.database).unswept() == []


def late(jobs: Jobs, store: LocalStore, job: Job) -> str:
    """The key of a file that an attempt of long ago wrote after everything was swept, before it was killed."""
    assert Upkeep(jobs.database).unswept() == []
    key = f"{job.id}/{'0' * 32}/model.safetensors"
    write(store, key)
    return key


def lap(jobs: Jobs, store: LocalStore) -> None:
    """One janitor over the whole store: the first round lists it."""
    janitor = Janitor(jobs, Nobody(), interval=60, store=store)  # type: ignore[arg-type]
    for _ in range(2):
        janitor.round()


class Nobody:
    """A bell that nobody hears."""

    def waiting(self, queue: str) -> int:
        return 0

    def ring(self, job_id: str, queue: str, priority: int = 0) -> None:
        pass


@pytest.mark.parametrize("deleted", [False, True])
def test_what_a_killed_late_attempt_wrote_after_the_sweep_is_swept_too(
    jobs: Jobs, tmp_path: Path, deleted: bool
) -> None:
    store, job = LocalStore(tmp_path / "store"), claimed(jobs)
    kept = f"{job.id}/{job.lease_token}/kept"
    write(store, kept)
    jobs.publish(
        job.id, job.lease_token or "", {"manifest_key": kept, "files": [{"name": "kept", "key": kept, "sha256": "0"}]}
    )
    if deleted:
        jobs.delete(job.id)
    lap(jobs, store)
    late(jobs, store, job)
    lap(jobs, store)
    assert list(store.keys(job.id)) == ([] if deleted else [kept])
    assert deleted != (store.folder / job.id).exists()


def test_strays_beside_a_running_attempt_go_and_its_own_files_stay(jobs: Jobs, tmp_path: Path) -> None:
    store, first = LocalStore(tmp_path / "store"), claimed(jobs)
    recorded, torn = (f"{first.id}/{first.lease_token}/{name}" for name in ("recorded", "torn"))
    file = StoredFile(name="recorded", key=recorded, size=4, sha256="0")
    jobs.record_shard(first.id, first.lease_token or "", file, {})
    jobs.hand_back(first.id, first.lease_token or "")
    second = jobs.claim(first.id, lease_seconds=60)
    assert second is not None
    writing = f"{first.id}/{second.lease_token}/begun"
    for key in (recorded, torn, writing):
        write(store, key)
    lap(jobs, store)
    assert list(store.keys(first.id)) == sorted([recorded, writing])


def test_a_folder_of_no_known_merge_is_left_alone(jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Or a service that was pointed at the wrong database would delete every artifact there is."""
    store = LocalStore(tmp_path / "store")
    write(store, "mrg-of-others/token/model.safetensors")
    lap(jobs, store)
    assert list(store.keys("mrg-of-others")) == ["mrg-of-others/token/model.safetensors"]
    assert any("no merge in these records" in record.getMessage() for record in caplog.records)


def test_a_deleted_jobs_row_goes_after_its_time_and_a_last_sweep(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, job = LocalStore(tmp_path / "store"), claimed(jobs)
    jobs.fail(job.id, job.lease_token or "", MergeyardError("internal", "x"), retry=False)
    jobs.delete(job.id)
    lap(jobs, store)
    assert Upkeep(jobs.database).claims(job.id) is not None
    late(jobs, store, job)
    monkeypatch.setattr("app.records.upkeep.TOMBSTONE_SECONDS", -1.0)
    Janitor(jobs, Nobody(), interval=60, store=store).round()  # type: ignore[arg-type]
    assert Upkeep(jobs.database).claims(job.id) is None and list(store.keys(job.id)) == []


def test_what_a_process_that_died_was_deleting_is_deleted(jobs: Jobs, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    left = store.folder / ".trash" / "0123456789abcdef" / "token" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"data")
    Janitor(jobs, Nobody(), interval=60, store=store).round()  # type: ignore[arg-type]
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


class Stubborn(LocalStore):
    """A store in which some jobs' folders cannot be deleted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stuck: set[str] = set()

    def delete_prefix(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        if prefix in self.stuck:
            raise PermissionError(errno.EACCES, "Permission denied", prefix)
        super().delete_prefix(prefix, keep=keep)


def ended_with_leftovers(jobs: Jobs, store: LocalStore) -> Job:
    job = claimed(jobs)
    write(store, f"{job.id}/{job.lease_token}/left")
    return jobs.fail(job.id, job.lease_token or "", MergeyardError("internal", "x"), retry=False)


def test_a_folder_that_cannot_be_deleted_keeps_no_other_job_from_being_swept(
    jobs: Jobs, broker_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, bell = Stubborn(tmp_path / "store"), Bell(broker_url)
    stuck, other = (ended_with_leftovers(jobs, store) for _ in range(2))
    store.stuck.add(stuck.id)
    janitor = Janitor(jobs, bell, interval=60, store=store)
    janitor.round()
    assert list(store.keys(other.id)) == []
    assert [job.id for job in Upkeep(jobs.database).unswept()] == [stuck.id]
    assert any("Permission denied" in record.getMessage() for record in caplog.records)
    store.stuck.clear()
    janitor.round()
    assert list(store.keys(stuck.id)) == [], "it is tried again"
    bell.close()


def test_a_whole_batch_that_cannot_be_deleted_is_passed_by_and_tried_again(
    jobs: Jobs, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("upkeep", "janitor"):
        monkeypatch.setattr(f"app.records.{module}.BATCH", 2)
    store, bell = Stubborn(tmp_path / "store"), Bell(broker_url)
    first, second, third = (ended_with_leftovers(jobs, store) for _ in range(3))
    store.stuck = {first.id, second.id}
    janitor = Janitor(jobs, bell, interval=60, store=store)
    janitor.round()
    janitor.round()
    assert list(store.keys(third.id)) == []
    store.stuck.clear()
    janitor.round()
    assert Upkeep(jobs.database).unswept() == []
    bell.close()


def test_the_janitor_sweeps_abandoned_uploads(sqlite_url: str, broker_url: str, tmp_path: Path) -> None:
    jobs, bell, uploads = Jobs(Database(sqlite_url)), Bell(broker_url), UploadStore(tmp_path / "uploads")
    janitor = Janitor(jobs, bell, interval=60, uploads=uploads)
    janitor.round()  # without a folder there is nothing to do
    uploads.begin()
    (abandoned,) = uploads.folder.iterdir()
    janitor.round()
    assert abandoned.exists()
    os.utime(abandoned, (0, 0))
    janitor.round()
    assert not abandoned.exists()
    bell.close()
