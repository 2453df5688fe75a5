"""The audit: who did what, as append-only rows. They outlive the merges and keys that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select

from app.records.database import Database, clock
from app.records.key import AuditEntry, Caller
from app.records.tables import audit


class Audit:
    """The audit in ``database``. What changes other rows is recorded in the transaction that changes them."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(self, by: Caller, action: str, subject: str = "", data: Mapping[str, Any] | None = None) -> None:
        """Record what changes no other row: a download, a failed authentication."""
        with self.database.write() as connection:
            record(connection, by, action, subject, data)

    def list(
        self, *, after: int = 0, limit: int = 200, owner: str | None = None, action: str | None = None
    ) -> Sequence[AuditEntry]:
        """Entries numbered above ``after``, oldest first."""
        conditions = [audit.c.id > after]
        if owner is not None:
            conditions.append(audit.c.owner == owner)
        if action is not None:
            conditions.append(audit.c.action == action)
        statement = select(audit).where(*conditions).order_by(audit.c.id).limit(limit)
        with self.database.read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(statement)]


def record(
    connection: Connection, by: Caller, action: str, subject: str = "", data: Mapping[str, Any] | None = None
) -> None:
    """Add an entry in the caller's transaction."""
    connection.execute(
        insert(audit).values(
            at=clock(connection),
            action=action,
            owner=by.owner,
            key_id=by.key_id,
            request_id=by.request_id,
            subject=subject,
            data=dict(data or {}),
        )
    )
