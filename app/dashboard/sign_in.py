"""Signing in with a key, and out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app.api.callers import Known, presented
from app.api.gate import admit
from app.api.origins import check_same_site
from app.api.service import Serving
from app.api.session import forget_cookie, start_session
from app.dashboard.frame import OF_PAGES, ROOT, SIGN_IN, page, page_router
from app.errors import CODES, MergeyardError
from app.records.key import Caller

MAX_NEXT = 2000

router = page_router()


@router.get("/sign-in")
def sign_in_page(
    request: Request,
    serving: Serving,
    next: Annotated[str, Query(max_length=MAX_NEXT)] = ROOT,
    why: Annotated[str, Query(max_length=64)] = "",
) -> Response:
    """Where a key is asked for. While there are no keys nobody needs one."""
    if not serving.keys.exist():
        return RedirectResponse(_safe(next), status_code=303)
    told = CODES[why].title + "." if why in CODES else ""
    return page(request, None, "sign_in.html", next=_safe(next), refusal=told)


@router.post("/sign-in")
def sign_in(
    request: Request,
    serving: Serving,
    key: Annotated[str, Form(max_length=200)] = "",
    next: Annotated[str, Form(max_length=MAX_NEXT)] = ROOT,
) -> Response:
    """Makes a session from the key, as POST /session does, and leads on."""
    check_same_site(request.method, request.headers)
    answer, quota = admit(serving, replace(presented(request.scope), bearer=key.strip(), cookie=None))
    if isinstance(answer, MergeyardError):
        refused = page(request, None, "sign_in.html", status=answer.status, next=_safe(next), refusal=answer.message)
        refused.headers.update(quota.headers)
        return refused
    assert isinstance(answer, Caller)
    leading = RedirectResponse(_safe(next), status_code=303)
    if answer.key_id is not None:
        start_session(serving, answer, request, leading)
    return leading


@router.post("/sign-out")
def sign_out(caller: Known, request: Request, serving: Serving) -> Response:
    """Ends the session."""
    if caller.session is not None:
        serving.sessions.close(caller.session, by=caller)
    leading = RedirectResponse(SIGN_IN, status_code=303)
    forget_cookie(request, leading)
    return leading


def _safe(next: str) -> str:
    """Where to lead to; elsewhere than to a page nobody is led."""
    return next if OF_PAGES.fullmatch(next) and not next.startswith(SIGN_IN) else ROOT
