"""The outbox of webhooks: what is to be told is written in the transaction that ended the merge, so it is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, insert

from app.records.job import Job, Kind
from app.records.key import random_text
from app.records.tables import deliveries


class DeliveryState(StrEnum):
    PENDING = "pending"  # to be sent, for the first time or again
    DELIVERED = "delivered"  # the receiver answered 2xx
    FAILED = "failed"  # given up


def enqueue(connection: Connection, job: Job, now: datetime, happened: Sequence[str]) -> None:
    """Write what the job's webhook wants to be told of these events, in the transaction that leaves them."""
    for kind in happened:
        if job.webhook is None or kind not in job.webhook["events"]:
            continue
        connection.execute(
            insert(deliveries).values(
                id=f"msg_{random_text(26)}",
                job_id=job.id,
                owner=job.owner,
                type=f"{job.kind}.{kind}",
                url=job.webhook["url"],
                body=json.dumps(message(job, kind, now), ensure_ascii=False, separators=(",", ":")),
                state=DeliveryState.PENDING,
                attempts=[],
                next_at=now,
                created_at=now,
            )
        )


def message(job: Job, kind: str, now: datetime) -> dict[str, Any]:
    """The body of a webhook: what happened to which merge, sweep or evaluation; a GET of it has the rest."""
    artifact = (job.artifact or {}) if job.kind is Kind.MERGE else {}
    return {
        "type": f"{job.kind}.{kind}",
        "timestamp": now.isoformat(),
        "data": {
            "id": job.id,
            "status": job.status,
            "method": job.method,
            "labels": dict(job.labels),
            "attempt": job.attempt,
            "error": None if job.error is None else {name: job.error[name] for name in ("code", "message", "fault")},
            "artifact": {"manifest_sha256": artifact["manifest_sha256"], "size": artifact["size"]}
            if artifact
            else None,
            "created_at": job.created_at.isoformat(),
            "finished_at": None if job.finished_at is None else job.finished_at.isoformat(),
        },
    }
