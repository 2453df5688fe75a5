"""Any order of transitions, by workers old and new, on both databases: what is promised of a job always holds."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import update

from app.errors import MergeyardError
from app.records.job import CancelRequested, Job, LeaseLost, Status
from app.records.jobs import Jobs
from app.records.tables import jobs as table
from app.records.upkeep import Upkeep
from tests.records.submitting import ARTIFACT, new_job

ENDINGS = {"succeeded", "failed", "cancelled"}


class OneJob(RuleBasedStateMachine):
    """One job of two attempts; every worker that ever claimed it goes on writing under its token."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self.jobs = jobs
        self.upkeep = Upkeep(jobs.database)
        self.job, _ = jobs.submit(new_job(max_attempts=2))
        self.tokens: list[str] = []
        self.seen: list[Job] = [self.job]

    def now(self) -> Job:
        return self.jobs.get(self.job.id)

    @rule()
    def claim(self) -> None:
        before = self.now()
        claimed = self.jobs.claim(self.job.id, lease_seconds=60)
        assert (claimed is not None) == (before.status is Status.QUEUED or self.expired(before))
        if claimed is not None:
            assert claimed.lease_token and claimed.lease_token not in self.tokens
            self.tokens.append(claimed.lease_token)

    @precondition(lambda self: self.tokens)
    @rule(
        index=st.integers(-2, -1),
        write=st.sampled_from(["beat", "stage", "publish", "fail", "fail for good", "hand back", "confirm"]),
    )
    def write(self, index: int, write: str) -> None:
        token = self.tokens[max(index, -len(self.tokens))]
        before, jobs, job_id = self.now(), self.jobs, self.job.id
        held = before.lease_token == token
        error = MergeyardError("internal", "x")
        try:
            match write:
                case "beat":
                    beat = jobs.heartbeat(job_id, token, lease_seconds=60, progress_bytes=1)
                    assert beat.cancel_requested == (before.status is Status.CANCELLING)
                case "stage":
                    jobs.set_stage(job_id, token, "merging")
                case "publish":
                    jobs.publish(job_id, token, ARTIFACT)
                case "fail" | "fail for good":
                    jobs.fail(job_id, token, error, retry=write == "fail")
                case "hand back":
                    jobs.hand_back(job_id, token)
                case "confirm":
                    jobs.confirm_cancelled(job_id, token)
        except LeaseLost:
            assert not held and self.now() == before, "a stale token writes nothing"
        except CancelRequested:
            assert held and write == "publish" and before.status is Status.CANCELLING
        except ValueError:
            assert held and write == "confirm" and before.status is Status.RUNNING
        else:
            assert held

    @rule()
    def cancel(self) -> None:
        before = self.now()
        try:
            after = self.jobs.request_cancel(self.job.id)
        except MergeyardError as error:
            assert error.code == "conflict" and before.status in (Status.SUCCEEDED, Status.FAILED)
        else:
            assert after.status in (Status.CANCELLING, Status.CANCELLED)

    @rule()
    def let_the_lease_run_out(self) -> None:
        database = self.jobs.database
        with database.write() as connection:
            connection.execute(
                update(table)
                .where(table.c.id == self.job.id, table.c.lease_token.is_not(None))
                .values(lease_expires_at=self.job.created_at - timedelta(seconds=1))
            )

    @rule()
    def janitor(self) -> None:
        self.upkeep.round()
        after = self.now()
        assert after.lease_expires_at is None or after.lease_expires_at > self.job.created_at, "no dead lease is left"

    @invariant()
    def promises_hold(self) -> None:
        now, before = self.now(), self.seen[-1]
        if before.status.finished:
            assert now == before, "a finished job never changes"
        assert now.version >= before.version
        assert 0 <= now.attempt <= now.max_attempts
        assert (now.lease_token is not None) == (now.status in (Status.RUNNING, Status.CANCELLING))
        assert (now.artifact is not None) == (now.status is Status.SUCCEEDED)
        assert (now.error is not None) == (now.status is Status.FAILED)
        assert (now.finished_at is not None) == now.status.finished
        kinds = [event.type for event in self.jobs.events(self.job.id)]
        endings = [kind for kind in kinds if kind in ENDINGS]
        assert endings == ([str(now.status)] if now.status.finished else []), "one ending, told once"
        self.seen.append(now)

    def expired(self, job: Job) -> bool:
        dead = job.lease_expires_at is not None and job.lease_expires_at < self.job.created_at
        return job.status is Status.RUNNING and dead and job.attempt < job.max_attempts


def test_whatever_happens_in_whatever_order_the_promises_hold(jobs: Jobs) -> None:
    run_state_machine_as_test(
        lambda: OneJob(jobs),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
