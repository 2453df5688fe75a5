"""Deleting a finished job, because somebody asks for it or because its time is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete

from app.records import artifacts, audit, rows
from app.records.job import Job
from app.records.key import Caller
from app.records.tables import idempotency
from app.records.transitions import Change


def remove(
    connection: Connection,
    job: Job,
    change: Change,
    action: str,
    *,
    by: Caller | None,
    data: Mapping[str, Any] | None = None,
) -> Job:
    """Write what the rule ``delete`` or ``expire`` decided about ``job``, whose row the caller has locked.

    Raises ``merge_in_use`` while an alias or an unfinished job needs it.
    """
    artifacts.check_unused(connection, job)
    if by is not None:
        audit.record(connection, by, action, job.id, data)
    written = rows.apply(connection, job, change)
    artifacts.release(connection, job)
    # The key may be used again: it must not lead to a job nobody can see.
    connection.execute(delete(idempotency).where(idempotency.c.job_id == job.id))
    return written
