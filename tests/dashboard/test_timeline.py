"""Stages and their times, read off events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from app.artifacts.manifest import StoredFile
from app.dashboard.timeline import Span, merged_since, timeline
from app.errors import MergeyardError
from app.records.job import Event, Stage
from app.records.jobs import Jobs
from tests.records.submitting import ARTIFACT, claimed, new_job

START = datetime(2026, 1, 31, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def happened(*happenings: tuple[float, str, dict[str, Any]]) -> list[Event]:
    return [
        Event(id=number, job_id="mrg-1", type=kind, at=at(second), data=data)
        for number, (second, kind, data) in enumerate(happenings, 1)
    ]


SUBMITTED = (0, "submitted", {})
ERROR = {"code": "disk_full", "message": "No room."}


def claim(second: float, attempt: int = 1) -> tuple[float, str, dict[str, Any]]:
    return (second, "claimed", {"attempt": attempt, "worker": "gpu-1", "process": 7})


def test_a_merge_waits_and_goes_through_its_stages() -> None:
    found = timeline(
        happened(
            SUBMITTED,
            claim(2),
            (5, "stage", {"stage": "merging"}),
            (6, "shard", {"name": "model.safetensors"}),
            (65, "stage", {"stage": "publishing"}),
            (66, "succeeded", {}),
        )
    )
    assert found.spans == (
        Span("waiting", at(0), at(2)),
        Span("resolving", at(2), at(5)),
        Span("merging", at(5), at(65)),
        Span("publishing", at(65), at(66)),
    )
    (attempt,) = found.attempts
    assert (attempt.number, attempt.worker, attempt.ending, attempt.code) == (1, "gpu-1", "succeeded", "")
    assert (attempt.began, attempt.ended) == (at(2), at(66))
    assert found.stage_seconds(at(1000)) == {"waiting": 2, "resolving": 3, "merging": 60, "publishing": 1}


def test_what_goes_on_has_no_end_yet() -> None:
    found = timeline(happened(SUBMITTED, claim(2), (5, "stage", {"stage": "merging"})))
    assert found.spans[-1] == Span("merging", at(5), None)
    assert (found.attempts[0].ending, found.attempts[0].ended) == ("", None)
    assert found.stage_seconds(at(25))["merging"] == 20


def test_each_attempt_says_why_it_came_to_nothing() -> None:
    found = timeline(
        happened(
            SUBMITTED,
            claim(1),
            (2, "retried", {"attempt": 1, "error": ERROR}),
            claim(7, 2),
            (8, "worker_lost", {"attempt": 2, "reason": "stalled"}),
            claim(20, 3),
            (21, "stage", {"stage": "merging"}),
            (30, "failed", {"attempt": 3, "error": {"code": "out_of_memory", "message": "Too little memory."}}),
        )
    )
    assert [(attempt.number, attempt.ending, attempt.code) for attempt in found.attempts] == [
        (1, "failed", "disk_full"),
        (2, "lost", "worker_lost"),
        (3, "failed", "out_of_memory"),
    ]
    assert found.attempts[1].message == "The merge did not move for too long."
    assert [span.name for span in found.spans] == [
        *("waiting", "resolving"),
        *("waiting", "resolving"),
        *("waiting", "resolving", "merging"),
    ]
    assert found.stage_seconds(at(100))["waiting"] == 1 + 5 + 12


def test_the_last_attempts_loss_fails_the_merge_and_is_told_once() -> None:
    found = timeline(
        happened(
            SUBMITTED,
            claim(1),
            (9, "worker_lost", {"attempt": 1, "reason": "lease_expired"}),
            (9, "failed", {"attempt": 1, "error": {"code": "worker_lost", "message": "It was the only attempt."}}),
        )
    )
    assert [span.name for span in found.spans] == ["waiting", "resolving"]
    assert [attempt.ending for attempt in found.attempts] == ["lost"]


def test_a_hand_back_costs_no_attempt() -> None:
    found = timeline(happened(SUBMITTED, claim(1), (2, "handed_back", {"attempt": 1}), claim(3), (4, "cancelled", {})))
    assert [(attempt.number, attempt.ending) for attempt in found.attempts] == [(1, "handed back"), (1, "cancelled")]


def test_a_merge_that_was_cancelled_in_the_queue_had_no_attempt() -> None:
    found = timeline(happened(SUBMITTED, (3, "cancel_requested", {}), (3, "cancelled", {})))
    assert found.spans == (Span("waiting", at(0), at(3)),)
    assert found.attempts == ()


def test_a_result_that_was_there_took_no_time() -> None:
    found = timeline(happened(SUBMITTED, (0, "reused", {"artifact": "mrg-0"}), (0, "succeeded", {"reused": True})))
    assert (found.spans, found.attempts) == ((), ())


def test_it_reads_what_the_records_write(jobs: Jobs) -> None:
    job = claimed(jobs, max_attempts=2)
    token = job.lease_token or ""
    jobs.set_stage(job.id, token, Stage.MERGING)
    assert merged_since(jobs.get(job.id), timeline(jobs.events(job.id))) is not None
    jobs.fail(job.id, token, MergeyardError("disk_full", "No room."), retry=True)
    assert merged_since(jobs.get(job.id), timeline(jobs.events(job.id))) is None
    again = jobs.claim(job.id, lease_seconds=60, worker="gpu-2")
    assert again is not None
    token = again.lease_token or ""
    jobs.set_stage(job.id, token, Stage.MERGING)
    jobs.record_shard(job.id, token, StoredFile(name="m", key="k", size=1, sha256="a" * 64), {})
    jobs.set_stage(job.id, token, Stage.PUBLISHING)
    jobs.publish(job.id, token, ARTIFACT)
    found = timeline(jobs.events(job.id))
    assert [span.name for span in found.spans] == [
        *("waiting", "resolving", "merging"),
        *("waiting", "resolving", "merging", "publishing"),
    ]
    assert [(attempt.number, attempt.worker, attempt.ending, attempt.code) for attempt in found.attempts] == [
        (1, "", "failed", "disk_full"),
        (2, "gpu-2", "succeeded", ""),
    ]
    assert all(before.ended == after.began for before, after in zip(found.spans[:-1], found.spans[1:], strict=True))


def test_a_waiting_merge_of_the_records(jobs: Jobs) -> None:
    job, _ = jobs.submit(new_job())
    assert [(span.name, span.ended) for span in timeline(jobs.events(job.id)).spans] == [("waiting", None)]
