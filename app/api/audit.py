"""/audit: who did what, for admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.api.callers import Administering
from app.api.merges import Problem
from app.api.schemas import AuditDocument, AuditPage
from app.api.service import Serving

router = APIRouter(prefix="/audit", tags=["audit"])


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
