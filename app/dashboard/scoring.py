"""/ui/sweeps and /ui/evaluations: what scores models, as lists and each on a page of its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from app.api.callers import Merging, Reading
from app.api.jobs import Id
from app.api.scoring_schemas import Evaluation, Sweep, sweep_rows
from app.api.service import Service, Serving
from app.api.sweeps import merge_point
from app.dashboard import shown
from app.dashboard.frame import CSP, PLOTLY_CSP, ROOT, page, page_router, static
from app.errors import MergeyardError
from app.recipe.difference import as_yaml
from app.records.job import Job, Kind
from app.records.key import Caller, Scope
from app.sweeps.drawings import drawings

ROWS = 50


def scoring_pages(kind: Kind) -> APIRouter:
    """The pages of a kind."""
    router = page_router(f"/{kind}s")

    @router.get("")
    def list_page(
        caller: Reading,
        request: Request,
        serving: Serving,
        cursor: Annotated[str, Query(max_length=500)] = "",
    ) -> Response:
        """A page of those that the caller sees, newest first."""
        found = serving.jobs.list(limit=ROWS, cursor=cursor or None, by=caller, kind=kind)
        return page(
            request,
            caller,
            "scorings.html",
            kind=kind,
            jobs=found.jobs,
            cursor=cursor,
            following=found.next_cursor or "",
            ago=shown.ago,
            at=serving.database.now(),
        )

    @router.get("/{id}")
    def job_page(caller: Reading, id: Id, request: Request, serving: Serving) -> Response:
        """Everything that is known of one."""
        return _page(request, serving, caller, serving.jobs.get(id, by=caller, kind=kind))

    @router.post("/{id}/cancel")
    def cancel(caller: Merging, id: Id, request: Request, serving: Serving) -> Response:
        """As the API's cancel."""
        try:
            serving.jobs.request_cancel(id, by=caller, kind=kind)
        except MergeyardError as error:
            job = serving.jobs.get(id, by=caller, kind=kind)
            return _page(request, serving, caller, job, refusal=error)
        return RedirectResponse(f"{ROOT}/{kind}s/{id}", status_code=303)

    @router.post("/{id}/delete")
    def delete(caller: Merging, id: Id, request: Request, serving: Serving) -> Response:
        """As the API's delete; leads to the list."""
        try:
            serving.discard(serving.jobs.delete(id, by=caller, kind=kind))
        except MergeyardError as error:
            job = serving.jobs.get(id, by=caller, kind=kind)
            return _page(request, serving, caller, job, refusal=error)
        return RedirectResponse(f"{ROOT}/{kind}s", status_code=303)

    return router


sweeps = scoring_pages(Kind.SWEEP)
evaluations = scoring_pages(Kind.EVALUATION)


@sweeps.post("/{id}/merges")
async def merge_one(
    caller: Merging, id: Id, request: Request, serving: Serving, point: Annotated[int, Form(ge=0, lt=100_000)]
) -> Response:
    """As POST /sweeps/{id}/merges; leads to the merge."""
    try:
        merge = await merge_point(serving, caller, id, point, {})
    except MergeyardError as error:
        job = await run_in_threadpool(serving.jobs.get, id, by=caller, kind=Kind.SWEEP)
        return await run_in_threadpool(_page, request, serving, caller, job, refusal=error)
    return RedirectResponse(f"{ROOT}/merges/{merge.id}", status_code=303)


def _page(
    request: Request, serving: Service, caller: Caller, job: Job, *, refusal: MergeyardError | None = None
) -> Response:
    points = serving.points.of(job.id)
    sweep = Sweep.of(job, points) if job.kind is Kind.SWEEP else None
    evaluation = Evaluation.of(job, points) if job.kind is Kind.EVALUATION else None
    drawn = [asdict(drawing) for drawing in drawings(sweep_rows(job, points))] if sweep else []
    return page(
        request,
        caller,
        "sweep.html" if sweep else "evaluation.html",
        status=200 if refusal is None else refusal.status,
        csp=PLOTLY_CSP if sweep else CSP,
        job=sweep or evaluation,
        unfinished=not job.status.finished,
        may=caller.may(Scope.MERGE),
        refusal=refusal,
        recipe=as_yaml(sweep.recipe) if sweep else "",
        drawings=drawn,
        plotly=static("plotly.min.js"),
        percent=shown.percent,
        moment=shown.moment,
    )
