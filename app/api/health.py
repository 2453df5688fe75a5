"""/healthz says that the process lives, /readyz that it can do its work."""

from __future__ import annotations

from fastapi import APIRouter

import app
from app.api.jobs import Problem
from app.api.schemas import Health, Readiness
from app.api.service import Serving
from app.errors import MergeyardError
from app.errors import Problem as Finding

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health, summary="Is the process alive?")
async def healthz() -> Health:  # in the event loop: every thread may be waiting for a database that does not answer
    return Health(status="ok", version=app.__version__)


@router.get("/readyz", response_model=Readiness, summary="Can it work?", responses={503: Problem})
def readyz(serving: Serving) -> Readiness:
    """The database answers and is migrated, the queue answers, the store and the data folder take writes; 503 names
    what does not.
    """
    found = serving.readiness.look()
    findings = [
        Finding(code=error.code, message=error.message, where=part)
        for part, error in found.items()
        if error is not None
    ]
    if findings:
        raise MergeyardError.of(findings)
    return Readiness(status="ok", database="ok", queue="ok", store="ok", data="ok")
