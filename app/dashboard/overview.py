"""/ui: what waits, what runs, what failed and whether the service can work, for the person on call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fastapi import Request
from fastapi.responses import Response

from app.api.callers import Reading
from app.api.figures import disks
from app.api.queues import QueueDocument
from app.api.service import Service, Serving
from app.dashboard import shown
from app.dashboard.frame import page, page_router
from app.errors import MergeyardError
from app.records.job import Kind, Listed, Status
from app.records.key import Caller
from app.records.quotas import Usage
from app.records.workers import Worker, WorkerState

RUNNING = 50  # that are shown; the list has all
FAILURES = 200  # of the newest, that are grouped
NAMED = 3  # of each group

router = page_router()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A job that somebody works on. Bytes a second since it was first claimed, None where that says nothing."""

    merge: Listed
    bytes_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Of the newest failures, those of one code; ``merges`` are the newest of them."""

    code: str
    title: str
    count: int
    merges: Sequence[Listed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Of one folder, in bytes."""

    folder: str
    free: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What the page shows. ``broken``: the parts of the service that cannot work, and why."""

    now: datetime
    queues: Sequence[QueueDocument]
    running: Sequence[Running]
    workers: Sequence[Worker]
    failures: Sequence[Failures]
    disks: Sequence[Disk]
    usage: Usage
    broken: Sequence[tuple[str, MergeyardError]]

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self.queues)

    @property
    def oldest_seconds(self) -> float:
        return max((queue.oldest_seconds for queue in self.queues), default=0.0)

    @property
    def alive(self) -> int:
        return sum(worker.state is not WorkerState.LOST for worker in self.workers)


@router.get("")
def overview_page(caller: Reading, request: Request, serving: Serving) -> Response:
    """The overview of what the caller may see."""
    names = ("size", "duration", "moment", "percent", "ago", "address")
    functions = {name: getattr(shown, name) for name in names}
    return page(request, caller, "overview.html", view=overview(serving, caller), **functions)


def overview(serving: Service, caller: Caller) -> Overview:
    """Jobs of the caller's alone, and of everybody's for an admin; queues, workers and disks are everybody's."""
    now = serving.database.now()
    held = serving.jobs.list(status=[Status.RUNNING, Status.CANCELLING], limit=RUNNING, by=caller, kind=None).jobs
    failed = serving.jobs.list(status=Status.FAILED, limit=FAILURES, by=caller, kind=None).jobs
    every = caller.sees is None
    return Overview(
        now=now,
        queues=[QueueDocument.of(queue) for queue in serving.queues.list(by=caller)],
        running=[running(job, now) for job in held],
        workers=serving.workers.list(by=caller),
        failures=grouped(failed),
        disks=[Disk(folder=name, free=found.free, size=found.total) for name, found in disks(serving.figures.folders)],
        usage=serving.quotas.of_all() if every else serving.quotas.of_owner(caller.owner),
        broken=[(part, error) for part, error in serving.readiness.look().items() if error is not None],
    )


def running(job: Listed, now: datetime) -> Running:
    """A retry's bytes are not those of the time since the first attempt began: it has no speed. Neither has a sweep."""
    seconds = 0.0 if job.started_at is None else (now - job.started_at).total_seconds()
    if job.kind is not Kind.MERGE or job.attempt > 1 or job.progress_bytes <= 0 or seconds <= 0:
        return Running(merge=job, bytes_per_second=None, seconds_left=None)
    speed = job.progress_bytes / seconds
    left = max(0, job.total_bytes - job.progress_bytes) / speed
    return Running(merge=job, bytes_per_second=speed, seconds_left=left)


def grouped(failed: Sequence[Listed]) -> Sequence[Failures]:
    """The most frequent code first. ``failed``: the newest first."""
    by_code: dict[str, list[Listed]] = {}
    for job in failed:
        by_code.setdefault(str((job.error or {}).get("code", "internal")), []).append(job)
    groups = [
        Failures(
            code=code,
            title=str((merges[0].error or {}).get("title", "")),
            count=len(merges),
            merges=merges[:NAMED],
        )
        for code, merges in by_code.items()
    ]
    return sorted(groups, key=lambda group: -group.count)
