"""The state machine: every change of a job's status is one of these named rules.

    queued ──claim──▶ running ──publish──▶ succeeded
      ▲ ▲               │ │ └──fail──▶ failed          (``retry`` and attempts left: back to queued)
      │ └──hand_back────┘ ├──lose──▶ queued | failed   (its worker is gone)
      │                   └──request_cancel──▶ cancelling ──confirm_cancelled──▶ cancelled
      ├──request_cancel──▶ cancelled                   (``conclude``: as publish, of what has scores and no artifact)
      └──reuse──▶ succeeded                            (a job as it is submitted; nobody ever claims it)

In ``cancelling``, publish is refused, and fail, lose and hand_back end in ``cancelled``.

What goes back to the queue after a failure waits there, longer each time (``retry_at``); what was handed back does not.
What the store has no room for waits there too, unclaimed (``wait_for_disk``).

A rule looks at the job as it is (locked, in the transaction that will write) and says what to write and which
events to leave; ``jobs.py`` does both under the lease token. Rules are pure: no clock, no database. Only ``claim``
decides in SQL, because there the race is the rule; see ``Jobs.claim``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from app.artifacts.manifest import StoredFile
from app.errors import CODES, MergeyardError
from app.records.job import NO_FILES, CancelRequested, Job, Stage, Status
from app.tasks.task import TaskScore

Happening = tuple[str, Mapping[str, Any]]  # an event's type and data

LONGEST_PAUSE = 300.0  # seconds between two attempts
DISK = "disk"  # what a job waits for
LOST = {
    "lease_expired": "The worker stopped answering: it crashed, was killed (out of memory?) or lost its connection.",
    "stalled": "The merge did not move for too long.",
    "child_killed": "The merge's process was killed (signal 9), often by the kernel's out-of-memory killer.",
    "child_died": "The merge's process crashed; the worker's log has its last words.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a rule writes: column ``values``, and the events it leaves, in order."""

    values: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Happening, ...] = ()


# ── under the lease token ───────────────────────────────────────────────────────────────────────


def heartbeat(
    job: Job, now: datetime, *, lease_seconds: float, progress_bytes: int | None, total_bytes: int | None
) -> Change:
    """The lease lives on. ``progress_at`` moves with the progress only: a heartbeat proves no more than life."""
    values: dict[str, Any] = {"lease_expires_at": now + timedelta(seconds=lease_seconds)}
    if progress_bytes is not None and progress_bytes != job.progress_bytes:
        values |= {"progress_bytes": progress_bytes, "progress_at": now}
    if total_bytes is not None:
        values["total_bytes"] = total_bytes
    return Change(values=values)


def enter_stage(job: Job, now: datetime, *, stage: Stage) -> Change:
    """The attempt is in another stage; that is progress."""
    if stage == job.stage:
        return Change()
    return Change(values={"stage": stage, "progress_at": now}, events=(("stage", {"stage": stage}),))


def score(job: Job, now: datetime, *, found: TaskScore) -> Change:  # noqa: ARG001
    """The result was scored on a task; that is progress."""
    return Change(values={"progress_at": now}, events=(("scored", asdict(found)),))


def finish_file(job: Job, file: StoredFile) -> Change:  # noqa: ARG001 — every rule looks at a job
    """A file of the artifact is durable in the store; the caller keeps it in ``shards``."""
    return Change(events=(("shard", {"name": file.name, "size": file.size, "sha256": file.sha256}),))


def reuse(job: Job, now: datetime, *, made_by: Job) -> Change:
    """queued → succeeded with the artifact of ``made_by``, in the transaction that submits the job."""
    artifact = made_by.artifact
    assert artifact is not None
    change = publish(job, now, artifact=artifact)
    ((ending, summary),) = change.events
    return Change(
        values={**change.values, "artifact_id": made_by.id},
        events=(("reused", {"artifact": made_by.id}), (ending, {**summary, "reused": True})),
    )


def publish(job: Job, now: datetime, *, artifact: Mapping[str, Any]) -> Change:
    """running → succeeded: this write *is* the publication. cancelling: raises CancelRequested."""
    if job.status is Status.CANCELLING:
        raise CancelRequested(job.id)
    summary = {"manifest_sha256": artifact.get("manifest_sha256"), "size": artifact.get("size")}
    return Change(
        values={
            **_let_go(Status.SUCCEEDED),
            "artifact": dict(artifact),
            "artifact_id": job.id,
            "progress_bytes": job.total_bytes,
            "progress_at": now,
            "finished_at": now,
            "expires_at": _expiry(job, now),
        },
        events=(("succeeded", summary),),
    )


def score_point(job: Job, now: datetime, *, number: int, scores: Sequence[TaskScore]) -> Change:  # noqa: ARG001
    """A point of a sweep was scored; the caller keeps the scores in ``points``. That is progress."""
    event: Happening = ("point", {"number": number, "scores": {score.name: score.score for score in scores}})
    return Change(values={"progress_at": now}, events=(event,))


def conclude(job: Job, now: datetime) -> Change:
    """running → succeeded: every point is scored. cancelling: raises CancelRequested."""
    if job.status is Status.CANCELLING:
        raise CancelRequested(job.id)
    return Change(
        values={
            **_let_go(Status.SUCCEEDED),
            "artifact": dict(NO_FILES),
            "progress_bytes": job.total_bytes,
            "progress_at": now,
            "finished_at": now,
            "expires_at": _expiry(job, now),
        },
        events=(("succeeded", {}),),
    )


def fail(job: Job, now: datetime, *, error: MergeyardError, retry: bool, pause: float) -> Change:
    """running → queued where ``retry`` and attempts remain, else → failed; cancelling → cancelled.

    The first retry waits for ``pause`` seconds, each one after it twice as long.
    """
    if job.status is Status.CANCELLING:
        return confirm_cancelled(job, now)
    reason = error_json(error)
    failures = failed_attempts(job, now, error.code, error.message)
    if retry and job.attempt < job.max_attempts:
        return Change(
            values={
                **_let_go(Status.QUEUED),
                "failures": failures,
                "rung_at": now,
                "retry_at": _later(job, now, pause),
            },
            events=(("retried", {"attempt": job.attempt, "error": reason}),),
        )
    return Change(
        values={**_let_go(Status.FAILED), "failures": failures, "error": reason, "finished_at": now},
        events=(("failed", {"attempt": job.attempt, "error": reason}),),
    )


def hand_back(job: Job, now: datetime) -> Change:
    """The worker was told to stop. running → queued, and the attempt does not count; cancelling → cancelled."""
    if job.status is Status.CANCELLING:
        return confirm_cancelled(job, now)
    return Change(
        values={**_let_go(Status.QUEUED), "attempt": job.attempt - 1, "rung_at": now},
        events=(("handed_back", {"attempt": job.attempt}),),
    )


def wait_for_disk(job: Job, now: datetime, *, needs: int, free: int, pause: float) -> Change:
    """queued → queued: a worker found too little room, and nobody looks again for ``pause`` seconds.

    The event is left once, not with every look.
    """
    event: Happening = ("waiting_for_disk", {"needs": needs, "free": free})
    again, last = now + timedelta(seconds=pause), now + timedelta(seconds=LONGEST_PAUSE)
    values = {"waits_for": DISK, "retry_at": min(max(again, job.retry_at or again), last)}
    return Change(values=values, events=() if job.waits_for == DISK else (event,))


def confirm_cancelled(job: Job, now: datetime) -> Change:
    """cancelling → cancelled: the worker has let go."""
    if job.status is not Status.CANCELLING:
        raise ValueError(f"{job.id} is {job.status}: nobody asked to cancel it")
    return _cancelled(now)


# ── from outside ────────────────────────────────────────────────────────────────────────────────


def request_cancel(job: Job, now: datetime) -> Change:
    """queued → cancelled at once; running → cancelling; again: nothing; succeeded or failed: ``conflict``."""
    match job.status:
        case Status.QUEUED:
            change = _cancelled(now)
            return Change(values=change.values, events=(("cancel_requested", {}), *change.events))
        case Status.RUNNING:
            return Change(values={"status": Status.CANCELLING}, events=(("cancel_requested", {}),))
        case Status.CANCELLING | Status.CANCELLED:
            return Change()
        case _:
            raise MergeyardError("conflict", f"The {job.kind} has already {job.status}; it can no longer be cancelled.")


def delete(job: Job, now: datetime) -> Change:
    """Hide a finished job. Its files go next, unless other jobs have the same artifact, and its row last."""
    if not job.status.finished:
        raise MergeyardError("conflict", f"The {job.kind} is {job.status}; cancel it first, then delete it.")
    return Change(values={"deleted_at": now, "swept": False, "artifact_id": None})


def expire(job: Job, now: datetime) -> Change:
    """Delete a succeeded job whose time is over. ``conflict`` where it is not, or where the job is pinned."""
    if job.pinned or job.expires_at is None or job.expires_at > now:
        raise MergeyardError("conflict", f"The {job.kind} has not expired.")
    return Change(values=delete(job, now).values, events=(("expired", {}),))


def lose(job: Job, now: datetime, *, reason: str, pause: float) -> Change:
    """The worker is dead or stalled (``reason``, a key of ``LOST``).

    running → queued while attempts remain, else → failed with ``worker_lost``; cancelling → cancelled. ``pause`` as
    in ``fail``.
    """
    lost: Happening = ("worker_lost", {"attempt": job.attempt, "reason": reason})
    if job.status is Status.CANCELLING:
        return Change(values=_cancelled(now).values, events=(lost, ("cancelled", {})))
    failures = failed_attempts(job, now, "worker_lost", LOST[reason])
    if job.attempt < job.max_attempts:
        return Change(
            values={
                **_let_go(Status.QUEUED),
                "failures": failures,
                "rung_at": now,
                "retry_at": _later(job, now, pause),
            },
            events=(lost,),
        )
    attempts = "the only attempt" if job.max_attempts == 1 else f"the last of {job.max_attempts} attempts"
    reason_json = error_json(
        MergeyardError("worker_lost", f"{LOST[reason]} It was {attempts}. Submit the {job.kind} again.")
    )
    return Change(
        values={**_let_go(Status.FAILED), "failures": failures, "error": reason_json, "finished_at": now},
        events=(lost, ("failed", {"attempt": job.attempt, "error": reason_json})),
    )


# ── parts ───────────────────────────────────────────────────────────────────────────────────────


def error_json(error: MergeyardError) -> dict[str, Any]:
    """The form of an error in rows, events and answers; never a trace."""
    return {
        "code": error.code,
        "title": CODES[error.code].title,
        "message": error.message,
        "where": error.where,
        "fault": error.fault,
        "problems": [problem.as_json() for problem in error.problems],
    }


def failed_attempts(job: Job, now: datetime, code: str, message: str) -> list[Mapping[str, Any]]:
    """``Job.failures`` with the attempt that is going on now."""
    return [*job.failures, {"attempt": job.attempt, "at": now.isoformat(), "code": code, "message": message}]


def _later(job: Job, now: datetime, pause: float) -> datetime | None:
    """When the next attempt may begin; None is at once."""
    seconds = min(LONGEST_PAUSE, pause * 2 ** min(job.attempt - 1, 16))
    return now + timedelta(seconds=seconds) if seconds > 0 else None


def _expiry(job: Job, now: datetime) -> datetime | None:
    return None if job.expires_in is None else now + timedelta(seconds=job.expires_in)


def _let_go(status: Status) -> dict[str, Any]:
    nothing = dict.fromkeys(("stage", "lease_token", "lease_expires_at", "retry_at", "waits_for"))
    return {"status": status, **nothing}


def _cancelled(now: datetime) -> Change:
    return Change(values={**_let_go(Status.CANCELLED), "finished_at": now}, events=(("cancelled", {}),))
