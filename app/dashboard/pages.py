"""All pages, and the way in."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from app.dashboard import frame, listed, merge, new, overview, scoring, sign_in
from app.dashboard.frame import ROOT

entrance = APIRouter(include_in_schema=False)


@entrance.get("/")
def front() -> Response:
    """The service's address leads a browser to its pages."""
    return RedirectResponse(ROOT, status_code=307)


ROUTERS = (
    entrance,
    frame.router,
    sign_in.router,
    overview.router,
    listed.router,
    new.router,
    merge.router,
    scoring.sweeps,
    scoring.evaluations,
)
