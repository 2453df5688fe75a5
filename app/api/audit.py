"""/audit: who did what, for admins."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from app.api.callers import Administering
from app.api.jobs import Problem
from app.api.schemas import Document
from app.api.service import Serving
from app.records.key import AuditEntry

router = APIRouter(prefix="/audit", tags=["audit"])


class AuditDocument(Document):
    """One thing that somebody did. ``subject`` is the id of a merge or a key, or a reference."""

    id: int
    at: datetime
    action: str = Field(examples=["submitted"])
    owner: str = Field(description="Whose key did it; cli:account@machine for `mergeyard keys`")
    key_id: str | None
    request_id: str
    subject: str
    data: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditDocument:
        return cls(**asdict(entry))


class AuditPage(Document):
    """Entries in order. ``after`` is what to ask for next time: the last id seen."""

    items: list[AuditDocument]
    after: int


@router.get("", response_model=AuditPage, summary="Who did what", responses={422: Problem})
def audit(
    caller: Administering,  # noqa: ARG001 — the scope is what is asked of it
    serving: Serving,
    after: Annotated[int, Query(ge=0, lt=1 << 62, description="Only entries with a greater id")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    owner: Annotated[str | None, Query(pattern=r"^[\w.@+:-]{1,96}$", description="Only what this owner did")] = None,
    action: Annotated[str | None, Query(pattern=r"^[a-z_]{1,32}$", description="Only this action")] = None,
) -> AuditPage:
    """Append-only, in order. Ask again with `after` to see what is new."""
    found = serving.audit.list(after=after, limit=limit, owner=owner, action=action)
    return AuditPage(items=[AuditDocument.of(entry) for entry in found], after=found[-1].id if found else after)
