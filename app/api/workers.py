"""/workers: who serves the queues."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from pydantic import Field

from app.api.callers import Reading
from app.api.schemas import Document
from app.api.service import Serving
from app.records.workers import Worker, WorkerState

router = APIRouter(prefix="/workers", tags=["service"])


class WorkerDocument(Document):
    """A worker. ``lost``: not heard of for 45 s; it is listed for a day."""

    name: str = Field(description="As in the `claimed` events of merges")
    host: str
    process: int
    device: str | None = Field(description="What it calculates on; null while it starts", examples=["cpu"])
    queues: list[str]
    state: WorkerState
    job: str | None = Field(description="The merge that it holds; null, though it is busy, where that is another's")
    version: str
    started_at: datetime
    seen_at: datetime

    @classmethod
    def of(cls, worker: Worker) -> WorkerDocument:
        return cls(
            name=worker.name,
            host=worker.host,
            process=worker.process,
            device=worker.device,
            queues=list(worker.queues),
            state=worker.state,
            job=worker.job,
            version=worker.version,
            started_at=worker.started_at,
            seen_at=worker.seen_at,
        )


class WorkerList(Document):
    """Workers by name."""

    items: list[WorkerDocument]


@router.get("", response_model=WorkerList, summary="Who works?")
def list_workers(caller: Reading, serving: Serving) -> WorkerList:
    """Every worker, and what it does. One that stops in good order is gone at once."""
    return WorkerList(items=[WorkerDocument.of(worker) for worker in serving.workers.list(by=caller)])
