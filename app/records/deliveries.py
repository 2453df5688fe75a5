"""What becomes of the webhooks in the outbox (``outbox.py``), attempt by attempt.

pending ──2xx──▶ delivered          Each attempt is in the row's log. What is taken for an attempt is hidden from
   └──attempts used up, or 410──▶ failed     others for TAKEN_SECONDS; if its sender dies, it is taken again: at
                                         least once, under one id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import exists, func, select, update

from app.records import rows
from app.records.database import Database, clock
from app.records.job import Kind
from app.records.key import Caller
from app.records.outbox import DeliveryState
from app.records.tables import deliveries

TAKEN_SECONDS = 60.0  # longer than an attempt may take
# Seconds from one attempt to the next: eleven attempts in 22 hours.
PAUSES = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 21_600, 28_800)
GONE = 410  # the receiver wants no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request. ``status`` is the answer's, None where there was none, and ``error`` says why."""

    at: datetime
    status: int | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Something to tell somebody. ``id`` is the webhook's id, the same at each attempt. ``body`` is what is signed."""

    id: str
    job_id: str
    owner: str
    type: str
    url: str
    body: str
    state: DeliveryState
    attempts: Sequence[Attempt]
    next_at: datetime | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Deliveries that are still to be made, and the seconds since the oldest was written."""

    count: int
    oldest_seconds: float


class Deliveries:
    """The outbox in ``database``. Any number of processes may send from it at once."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def take(self, limit: int) -> Sequence[Delivery]:
        """What is due, at most ``limit``, the longest due first; nobody else gets it for TAKEN_SECONDS."""
        with self.database.read() as connection:  # a writer would hold SQLite's lock for nothing
            due = deliveries.c.next_at <= clock(connection)
            if not connection.scalar(select(exists().where(due))):
                return []
        with self.database.write() as connection:
            now = clock(connection)
            oldest = select(deliveries.c.id).where(deliveries.c.next_at <= now).order_by(deliveries.c.next_at)
            ids = connection.scalars(oldest.limit(limit).with_for_update(skip_locked=True)).all()
            taken = update(deliveries).where(deliveries.c.id.in_(ids))
            found = connection.execute(
                taken.values(next_at=now + timedelta(seconds=TAKEN_SECONDS)).returning(deliveries)
            ).all()
        return [_read(row) for row in found]

    def note(self, delivery_id: str, *, status: int | None, error: str | None) -> Delivery | None:
        """An attempt ended: delivered, to be tried again after a pause that grows, or given up.

        None where its merge is gone.
        """
        with self.database.write() as connection:
            chosen = deliveries.c.id == delivery_id
            row = connection.execute(select(deliveries).where(chosen).with_for_update()).one_or_none()
            if row is None:
                return None
            now = clock(connection)
            attempts = [*row.attempts, {"at": now.isoformat(), "status": status, "error": error}]
            values: dict[str, Any] = {"attempts": attempts}
            if row.state == DeliveryState.PENDING:
                values |= _after(len(attempts), status, now)
            written = connection.execute(update(deliveries).where(chosen).values(values).returning(deliveries)).one()
            return _read(written)

    def pending(self) -> Pending:
        """What is neither delivered nor given up."""
        still = select(func.count(), func.min(deliveries.c.created_at)).where(deliveries.c.next_at.is_not(None))
        with self.database.read() as connection:
            count, since = connection.execute(still).one()
            age = 0.0 if since is None else max(0.0, (clock(connection) - since).total_seconds())
        return Pending(count=count, oldest_seconds=age)

    def of(self, job_id: str, *, by: Caller | None = None, kind: Kind = Kind.MERGE) -> Sequence[Delivery]:
        """The job's deliveries, oldest first. ``not_found`` as in ``Jobs``."""
        statement = select(deliveries).where(deliveries.c.job_id == job_id)
        with self.database.read() as connection:
            rows.get(connection, job_id, by=by, kind=kind)
            found = connection.execute(statement.order_by(deliveries.c.created_at, deliveries.c.id)).all()
        return [_read(row) for row in found]


def _after(attempts: int, status: int | None, now: datetime) -> Mapping[str, Any]:
    """What an attempt makes of a pending delivery."""
    if status is not None and 200 <= status < 300:
        return {"state": DeliveryState.DELIVERED, "next_at": None, "finished_at": now}
    if status == GONE or attempts > len(PAUSES):
        return {"state": DeliveryState.FAILED, "next_at": None, "finished_at": now}
    return {"next_at": now + timedelta(seconds=PAUSES[attempts - 1])}


def _read(row: Any) -> Delivery:
    values = dict(row._mapping)
    values["state"] = DeliveryState(values["state"])
    values["attempts"] = tuple(
        Attempt(at=datetime.fromisoformat(made["at"]), status=made["status"], error=made["error"])
        for made in values["attempts"]
    )
    return Delivery(**values)
