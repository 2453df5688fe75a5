"""Any order of transitions on both databases, by several workers old and new, under a clock that jumps and a broker
that loses, repeats and reorders its messages: what is promised of a job always holds, and every job comes to its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.job import CancelRequested, Job, LeaseLost, NoRoom, Status
from app.records.jobs import Jobs
from app.records.quotas import Quotas
from app.records.tables import UtcTime, artifacts
from app.records.tables import jobs as table
from app.records.upkeep import Upkeep
from tests.records.submitting import ARTIFACT, new_job

ENDINGS = {"succeeded", "failed", "cancelled"}
WORKERS = 3
LEASE_SECONDS, PAUSE_SECONDS = 60.0, 45.0
JUMPS = (-3600, -31, 31, 3600)  # seconds: some within a lease, some beyond it
KEY = "e" * 64  # of whatever is published here: any result may be another's
OWNERS = itertools.count()
TIMES = [column.name for column in table.columns if isinstance(column.type, UtcTime)]
DATED = [field.name for field in fields(Job) if field.name in TIMES]


class Service(RuleBasedStateMachine):
    """One or two jobs of two attempts, and others that reuse or read their results until somebody deletes them.

    A worker goes on writing under every token that it ever got.
    """

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self.jobs = Jobs(jobs.database, retry_seconds=PAUSE_SECONDS)
        self.upkeep = Upkeep(jobs.database, retry_seconds=PAUSE_SECONDS)
        self.owner = f"owner-{next(OWNERS)}"  # of this run alone: the database has others' artifacts
        self.messages: list[str] = []
        self.ids: list[str] = []
        self.held: list[list[tuple[str, str]]] = [[] for _ in range(WORKERS)]  # of each worker: (job, token)
        self.seen: dict[str, Job] = {}
        self.makers: set[str] = set()  # jobs that published something of their own, deleted or not
        self.reads: dict[str, str] = {}  # a job, and the one whose result it reads
        self.set_back = 0  # seconds that the clock is behind

    # ── the API ──────────────────────────────────────────────────────────────────────────────────

    @initialize()
    def begin(self) -> None:
        self.submit(True)

    @precondition(lambda self: len(self.ids) < 2)
    @rule(rings=st.booleans(), expires_in=st.sampled_from([None, 40]), pinned=st.booleans())
    def submit(self, rings: bool, expires_in: int | None = None, pinned: bool = False) -> None:
        job, _ = self.jobs.submit(new_job(owner=self.owner, max_attempts=2, expires_in=expires_in, pinned=pinned))
        self.take(job, rings)

    @precondition(lambda self: len(self.ids) < 4)
    @rule(expires_in=st.sampled_from([None, 40]))
    def submit_again(self, expires_in: int | None) -> None:
        new = new_job(owner=self.owner, max_attempts=2, reuse_key=KEY, expires_in=expires_in)
        maker = self.jobs.reusable(new)
        assert (maker is not None) == any(job.artifact is not None for job in self.seen.values())
        job, _ = self.jobs.submit(new, reuse=maker.id if maker else None)
        assert job.reused == (maker is not None) == (job.status is Status.SUCCEEDED)
        self.take(job, rings=not job.reused)

    @precondition(lambda self: 0 < len(self.ids) < 4)
    @rule(which=st.integers(0, 3))
    def submit_reading(self, which: int) -> None:
        read = self.one(which)
        if read.status is Status.SUCCEEDED:
            job, _ = self.jobs.submit(new_job(owner=self.owner, max_attempts=2, merges=[read.id]))
            self.reads[job.id] = read.id
            self.take(job, rings=True)

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 3))
    def delete(self, which: int) -> None:
        before = self.one(which)
        try:
            self.jobs.delete(before.id)
        except MergeyardError as error:
            expected = "merge_in_use" if before.status.finished else "conflict"
            assert error.code == expected and (self.is_read(before.id) or not before.status.finished)
        else:
            assert before.status.finished and not self.is_read(before.id)
            self.forget(before.id)

    def take(self, job: Job, rings: bool) -> None:
        self.ids.append(job.id)
        self.seen[job.id] = job
        if rings:
            self.messages.append(job.id)

    def one(self, which: int) -> Job:
        return self.jobs.get(self.ids[which % len(self.ids)])

    def is_read(self, job_id: str) -> bool:
        readers = [reader for reader, read in self.reads.items() if read == job_id and reader in self.ids]
        return any(not self.jobs.get(reader).status.finished for reader in readers)

    def forget(self, job_id: str) -> None:
        self.ids.remove(job_id)
        del self.seen[job_id]

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        before = self.one(which)
        try:
            after = self.jobs.request_cancel(before.id)
        except MergeyardError as error:
            assert error.code == "conflict" and before.status in (Status.SUCCEEDED, Status.FAILED)
        else:
            assert after.status in (Status.CANCELLING, Status.CANCELLED)

    # ── the broker ───────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.messages)
    @rule(
        which=st.integers(0, 20),
        worker=st.integers(0, WORKERS - 1),
        repeated=st.booleans(),
        room=st.sampled_from([9, 0]),
    )
    def deliver(self, which: int, worker: int, repeated: bool, room: int) -> None:
        """In any order, to anybody; ``repeated`` messages come again. A store without ``room`` takes no job."""
        position = which % len(self.messages)
        job_id = self.messages[position]
        if not repeated:
            del self.messages[position]
        if job_id not in self.ids:
            assert self.jobs.claim(job_id, lease_seconds=LEASE_SECONDS) is None, "it was deleted"
            return
        before, now = self.jobs.get(job_id), self.jobs.database.now()
        try:
            left = None if room else lambda: 0
            claimed = self.jobs.claim(job_id, lease_seconds=LEASE_SECONDS, worker=str(worker), free=left)
        except NoRoom as lacking:
            assert not room and before.status is Status.QUEUED and self.jobs.get(job_id) == before
            self.jobs.wait_for_disk(job_id, lacking, pause=PAUSE_SECONDS)
            assert self.jobs.get(job_id).waits_for == "disk" and not free(self.jobs.get(job_id), now)
            return
        assert (claimed is not None) == free(before, now)
        if dead(before, now):
            after = self.jobs.get(job_id)
            assert after.lease_token is None and not free(after, now), "the claim took it from its worker"
        if claimed is not None:
            assert claimed.lease_token and claimed.lease_token not in self.tokens()
            self.held[worker].append((job_id, claimed.lease_token))

    @precondition(lambda self: self.messages)
    @rule()
    def wipe(self) -> None:
        """The broker was restarted, and forgot everything."""
        self.messages.clear()

    # ── the workers ──────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: any(self.held))
    @rule(
        worker=st.integers(0, WORKERS - 1),
        index=st.integers(-2, -1),
        write=st.sampled_from(["beat", "stage", "shard", "publish", "fail", "fail for good", "hand back", "confirm"]),
    )
    def write(self, worker: int, index: int, write: str) -> None:
        mine = next(held for held in self.held[worker:] + self.held[:worker] if held)
        job_id, token = mine[max(index, -len(mine))]
        if job_id not in self.ids:
            with pytest.raises(LeaseLost):
                WRITES[write](self.jobs, job_id, token)
            return
        before = self.jobs.get(job_id)
        shards = self.jobs.shards(job_id)
        holds = before.lease_token == token
        try:
            WRITES[write](self.jobs, job_id, token)
        except LeaseLost:
            assert not holds and self.jobs.get(job_id) == before, "a stale token writes nothing"
            assert self.jobs.shards(job_id) == shards
        except CancelRequested:
            assert holds and write == "publish" and before.status is Status.CANCELLING
        except ValueError:
            assert holds and write == "confirm" and before.status is Status.RUNNING
        else:
            assert holds

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    @rule(seconds=st.sampled_from(JUMPS))
    def jump(self, seconds: int) -> None:
        """The database's clock jumps, which is the same as every stored time moving the other way."""
        self.set_back = max(0, self.set_back - seconds)
        with self.jobs.database.write() as connection:
            for row in connection.execute(select(table).where(table.c.id.in_(self.ids))).all():
                moved = {name: moved_by(row._mapping[name], -seconds) for name in TIMES}
                connection.execute(update(table).where(table.c.id == row.id).values(moved))
        for job_id, job in self.seen.items():
            self.seen[job_id] = replace(job, **{name: moved_by(getattr(job, name), -seconds) for name in DATED})

    @rule()
    def janitor(self) -> None:
        report = self.upkeep.round(ring_after=10)
        self.messages += [ring.id for ring in report.ring if ring.id in self.ids]
        now = self.jobs.database.now()
        for job in map(self.jobs.get, self.ids):
            assert job.lease_expires_at is None or job.lease_expires_at > now - timedelta(seconds=30), "a dead lease"

    @rule()
    def expire(self) -> None:
        now, read = self.jobs.database.now(), {job_id for job_id in self.ids if self.is_read(job_id)}
        due = {job.id for job in self.seen.values() if job.expires_at is not None and job.expires_at <= now}
        expired = {job.id for job in self.upkeep.expire() if job.id in self.ids}
        assert expired == {job_id for job_id in due - read if not self.seen[job_id].pinned}
        for job_id in expired:
            self.forget(job_id)

    # ── what always holds ────────────────────────────────────────────────────────────────────────

    @invariant()
    def promises_hold(self) -> None:
        for job_id, before in self.seen.items():
            now = self.jobs.get(job_id)
            if before.status.finished:
                assert now == before, "a finished job never changes"
            self.check(now, before)
            self.seen[job_id] = now

    @invariant()
    def what_is_kept_and_reserved_is_what_the_rows_say(self) -> None:
        with self.jobs.database.read() as connection:
            every = connection.execute(select(table.c.status, table.c.reserved_bytes)).all()
            kept = connection.scalars(select(table.c.artifact).join(artifacts, artifacts.c.id == table.c.id)).all()
        unfinished = [row.reserved_bytes for row in every if row.status not in ENDINGS]
        found = Quotas(self.jobs.database).of_all()
        assert (found.reserved, found.unfinished) == (sum(unfinished), len(unfinished))
        assert found.artifacts == sum(artifact["size"] for artifact in kept), "what several have counts once"

    @invariant()
    def artifacts_last_as_long_as_anybody_has_them(self) -> None:
        had = {job.artifact_id for job in self.seen.values()} - {None}
        self.makers |= {job.id for job in self.seen.values() if job.artifact_id == job.id}
        for maker in self.makers:
            claims = self.upkeep.claims(maker)
            assert claims is not None and bool(claims.keys) == (maker in had)

    def check(self, now: Job, before: Job) -> None:
        assert now.version >= before.version
        assert 0 <= now.attempt <= now.max_attempts
        assert (now.lease_token is not None) == (now.status in (Status.RUNNING, Status.CANCELLING))
        assert (now.artifact is not None) == (now.status is Status.SUCCEEDED)
        assert (now.error is not None) == (now.status is Status.FAILED)
        assert (now.finished_at is not None) == now.status.finished
        assert now.retry_at is None or now.status is Status.QUEUED
        assert now.waits_for is None or now.retry_at is not None
        assert list(now.failures[: len(before.failures)]) == list(before.failures), "a reason is never forgotten"
        failed = [failure["attempt"] for failure in now.failures]
        assert failed == sorted(set(failed)) and len(failed) <= now.attempt
        if now.status is Status.FAILED:
            assert now.failures[-1]["code"] == now.error["code"]
        kinds = [event.type for event in self.jobs.events(now.id)]
        endings = [kind for kind in kinds if kind in ENDINGS]
        assert endings == ([str(now.status)] if now.status.finished else []), "one ending, told once"

    def teardown(self) -> None:
        """One honest worker, the janitor and time end every job, whatever those who held it before try to write."""
        if self.set_back:
            self.jump(self.set_back)
        for _ in range(8):
            if all(self.jobs.get(job_id).status.finished for job_id in self.ids):
                break
            self.jump(3600)
            self.janitor()
            for job_id in set(self.messages):
                mine = self.jobs.claim(job_id, lease_seconds=LEASE_SECONDS)
                if mine is not None:
                    self.try_every_old_token(mine)
                    self.jobs.publish(job_id, mine.lease_token or "", ARTIFACT)
            self.messages.clear()
        self.promises_hold()
        assert all(job.status.finished for job in self.seen.values())

    def try_every_old_token(self, held: Job) -> None:
        for job_id, token in itertools.chain.from_iterable(self.held):
            for write in WRITES.values() if job_id == held.id else ():
                with pytest.raises(LeaseLost):
                    write(self.jobs, job_id, token)
        assert self.jobs.get(held.id) == held

    def tokens(self) -> set[str]:
        return {token for held in self.held for _, token in held}


WRITES: dict[str, Callable[[Jobs, str, str], Any]] = {
    "beat": lambda jobs, id, token: jobs.heartbeat(id, token, lease_seconds=LEASE_SECONDS, progress_bytes=1),
    "stage": lambda jobs, id, token: jobs.set_stage(id, token, "merging"),
    "shard": lambda jobs, id, token: jobs.record_shard(
        id, token, StoredFile(name="a", key=f"{id}/{token}/a", size=1, sha256="0" * 64), {}
    ),
    "publish": lambda jobs, id, token: jobs.publish(id, token, ARTIFACT, reuse_key=KEY),
    "fail": lambda jobs, id, token: jobs.fail(id, token, MergeyardError("internal", "x"), retry=True),
    "fail for good": lambda jobs, id, token: jobs.fail(id, token, MergeyardError("internal", "x"), retry=False),
    "hand back": lambda jobs, id, token: jobs.hand_back(id, token),
    "confirm": lambda jobs, id, token: jobs.confirm_cancelled(id, token),
}


def free(job: Job, now: datetime) -> bool:
    """Whether a claim of the job must succeed. One that is taken from a dead worker waits for its pause first."""
    waits = job.retry_at is not None and now < job.retry_at <= now + timedelta(seconds=301)
    return job.status is Status.QUEUED and not waits


def dead(job: Job, now: datetime) -> bool:
    """Whether the job's worker is given up."""
    return job.lease_expires_at is not None and job.lease_expires_at < now


def moved_by(moment: datetime | None, seconds: int) -> datetime | None:
    return None if moment is None else moment + timedelta(seconds=seconds)


def test_whatever_happens_in_whatever_order_the_promises_hold(jobs: Jobs) -> None:
    run_state_machine_as_test(
        lambda: Service(jobs),
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
