"""/ui/merges: the merges that the caller sees, newest first, by status, method and owner, a page at a time."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlencode

from fastapi import Query, Request
from fastapi.responses import Response

from app.api.callers import Reading
from app.api.service import Serving
from app.dashboard import shown
from app.dashboard.frame import page, page_router
from app.recipe.methods import METHODS
from app.records.job import Status
from app.records.key import Caller

ROWS = 50
UNFINISHED = (Status.QUEUED, Status.RUNNING, Status.CANCELLING)

router = page_router("/merges")


@router.get("")
def merges_page(
    caller: Reading,
    request: Request,
    serving: Serving,
    status: Annotated[Status | Literal["", "unfinished"], Query()] = "",
    method: Annotated[str, Query(pattern=r"^[a-z0-9_]{0,64}$")] = "",
    owner: Annotated[str, Query(pattern=r"^[\w.@+:-]{0,96}$")] = "",
    cursor: Annotated[str, Query(max_length=500)] = "",
) -> Response:
    """A page of them. ``owner`` is for those who see everybody's."""
    found = serving.jobs.list(
        status=UNFINISHED if status == "unfinished" else status or None,
        method=method or None,
        limit=ROWS,
        cursor=cursor or None,
        by=Caller(owner=owner, scopes=frozenset()) if owner and caller.sees is None else caller,
    )
    chosen = {"status": str(status), "method": method, "owner": owner if caller.sees is None else ""}
    query = {name: value for name, value in chosen.items() if value}
    following = urlencode({**query, "cursor": found.next_cursor}) if found.next_cursor else ""
    return page(
        request,
        caller,
        "merges.html",
        merges=found.jobs,
        chosen=chosen,
        statuses=["unfinished", *map(str, Status)],
        methods=sorted(METHODS),
        newest=f"?{urlencode(query)}" if cursor else "",
        following=f"?{following}" if following else "",
        size=shown.size,
        percent=shown.percent,
        ago=shown.ago,
        at=serving.database.now(),
    )
