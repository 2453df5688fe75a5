"""/queues: what waits, what runs, and who serves it."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from app.api.callers import Reading
from app.api.schemas import Document
from app.api.service import Serving
from app.records.queues import Queue, Urgency, Waiting

router = APIRouter(prefix="/queues", tags=["service"])


class WaitingDocument(Document):
    """Merges that wait. ``oldest_seconds``: since the oldest was submitted; 0 where none waits."""

    jobs: int
    oldest_seconds: float

    @classmethod
    def of(cls, waiting: Waiting) -> WaitingDocument:
        return cls(jobs=waiting.jobs, oldest_seconds=waiting.oldest_seconds)


class Waitings(Document):
    """By `priority`: above 0, 0, below 0. All of one is served before the next."""

    high: WaitingDocument
    normal: WaitingDocument
    low: WaitingDocument


class QueueDocument(Document):
    """A queue, with every owner's merges in it."""

    name: str
    waiting: int = Field(description="Also those in the pause after a failure")
    oldest_seconds: float = Field(description="Since the oldest that waits was submitted; 0 where none waits")
    by_priority: Waitings
    running: int
    workers: list[str] = Field(description="Names of the workers that serve it: empty means that nobody does")

    @classmethod
    def of(cls, queue: Queue) -> QueueDocument:
        return cls(
            name=queue.name,
            waiting=sum(waiting.jobs for waiting in queue.waiting.values()),
            oldest_seconds=max(waiting.oldest_seconds for waiting in queue.waiting.values()),
            by_priority=Waitings(
                high=WaitingDocument.of(queue.waiting[Urgency.HIGH]),
                normal=WaitingDocument.of(queue.waiting[Urgency.NORMAL]),
                low=WaitingDocument.of(queue.waiting[Urgency.LOW]),
            ),
            running=queue.running,
            workers=list(queue.workers),
        )


class QueueList(Document):
    """Queues by name."""

    items: list[QueueDocument]


@router.get("", response_model=QueueList, summary="How long are the queues?")
def list_queues(caller: Reading, serving: Serving) -> QueueList:
    """Every queue that a worker serves or that merges of yours are in, counted over all owners. An admin's key sees
    those that others made up, too.
    """
    return QueueList(items=[QueueDocument.of(queue) for queue in serving.queues.list(by=caller)])
