"""/ui/merges/{id}: the page of a merge, and what can be done with it there."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse

from app.api.aliases import NAME
from app.api.callers import Merging, Reading
from app.api.jobs import Id
from app.api.merges import rerun
from app.api.service import Service, Serving
from app.dashboard import shown
from app.dashboard.frame import CSP, PLOTLY_CSP, ROOT, page, page_router, static
from app.dashboard.graph import HEIGHT, WIDTH
from app.dashboard.merge_view import FIGURES, figure, merge_view
from app.errors import MergeyardError
from app.records.job import Job
from app.records.key import Caller
from app.records.lineage import Relative

RELATIONS = {  # of a source to what is made with it
    "base": "is the base of",
    "model": "is merged into",
    "adapter": "is merged into",
    "tokenizer": "lends tokens to",
    "result": "made the result that is also that of",
    "alias": "is pointed to by",
}

router = page_router("/merges/{id}")


@router.get("")
def merge_page(
    caller: Reading, id: Id, request: Request, serving: Serving, compare: Annotated[str, Query(max_length=96)] = ""
) -> Response:
    """Everything that is known of one merge."""
    return _page(request, serving, caller, serving.jobs.get(id, by=caller), compare=compare.strip())


@router.post("/cancel")
def cancel(caller: Merging, id: Id, request: Request, serving: Serving) -> Response:
    """As POST /merges/{id}/cancel."""
    try:
        serving.jobs.request_cancel(id, by=caller)
    except MergeyardError as error:
        return _refused(request, serving, caller, id, error)
    return _to(id)


@router.post("/rerun")
async def run_again(
    caller: Merging, id: Id, request: Request, serving: Serving, force: Annotated[bool, Form()] = False
) -> Response:
    """As POST /merges with what this merge was submitted with; leads to the new one."""
    try:
        job = await run_in_threadpool(serving.jobs.get, id, by=caller)
        new = await rerun(serving, caller, job, force=force)
    except MergeyardError as error:
        return await run_in_threadpool(_refused, request, serving, caller, id, error)
    return _to(new.id)


@router.post("/alias")
def point_alias(
    caller: Merging, id: Id, request: Request, serving: Serving, name: Annotated[str, Form(pattern=NAME, max_length=96)]
) -> Response:
    """As PUT /aliases/{name}."""
    try:
        serving.aliases.point(name, id, by=caller)
    except MergeyardError as error:
        return _refused(request, serving, caller, id, error)
    return _to(id)


@router.post("/delete")
def delete(caller: Merging, id: Id, request: Request, serving: Serving) -> Response:
    """As DELETE /merges/{id}; leads to the list."""
    try:
        serving.discard(serving.jobs.delete(id, by=caller))
    except MergeyardError as error:
        return _refused(request, serving, caller, id, error)
    return RedirectResponse(f"{ROOT}/merges", status_code=303)


def _to(id: str) -> Response:
    return RedirectResponse(f"{ROOT}/merges/{id}", status_code=303)


def _refused(request: Request, serving: Service, caller: Caller, id: str, error: MergeyardError) -> Response:
    """The page, with why what was asked for was not done."""
    return _page(request, serving, caller, serving.jobs.get(id, by=caller), refusal=error)


def _page(
    request: Request,
    serving: Service,
    caller: Caller,
    job: Job,
    *,
    compare: str = "",
    refusal: MergeyardError | None = None,
) -> Response:
    view = merge_view(serving, job, caller=caller, url=str(request.base_url).rstrip("/"), compare=compare)
    return page(
        request,
        caller,
        "merge.html",
        status=200 if refusal is None else refusal.status,
        csp=PLOTLY_CSP if view.heatmap else CSP,
        view=view,
        refusal=refusal,
        relations=RELATIONS,
        figures=FIGURES,
        figure=figure,
        node_kind=_kind,
        node_size=(WIDTH, HEIGHT),
        plotly=static("plotly.min.js"),
        **{name: getattr(shown, name) for name in ("size", "percent", "norm", "duration", "moment", "shortened")},
    )


def _kind(relative: Relative) -> str:
    """What a node of the lineage is, in words."""
    if relative.kind != "merge":
        return {"base": "base model", "tokenizer": "lends tokens"}.get(relative.kind, relative.kind)
    return f"merge, {relative.merge.method}, {relative.merge.status}" if relative.merge else "merge, deleted"
