"""What sweeps and evaluations have in common: jobs whose result are scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.api.answers import FROM_A_SWEEP, FROM_AN_EVALUATION, JOB_HEADERS, NEXT_PAGE, links
from app.api.callers import Merging, Reading
from app.api.envelope import Running
from app.api.eventstream import MEDIA_TYPE
from app.api.jobs import (
    After,
    Id,
    IfNoneMatch,
    LastEventId,
    Limit,
    Problem,
    describe,
    events_of,
    link_next,
    unchanged,
)
from app.api.schemas import EventPage
from app.api.scored import Evaluation, ScoringPage, ScoringSummary, Sweep
from app.api.service import Serving
from app.api.webhooks import DeliveryList, deliveries_of
from app.records.job import POINT_UNITS, Kind, NewJob, NewPoint, Status
from app.settings import Settings
from app.sweeps.planning import PlannedSweep


def new_job(
    kind: Kind,
    asked: Mapping[str, Any],
    running: Running,
    planned: PlannedSweep,
    *,
    owner: str,
    settings: Settings,
    merges: Collection[str],
) -> NewJob:
    """The job of what was planned. ``asked``: as it was submitted; ``merges``: the ids of those that it reads."""
    last = planned.points[-1].plan
    warnings = {(item.code, item.where): item for point in planned.points for item in point.plan.warnings}
    return NewJob(
        kind=kind,
        recipe=asked,
        resolved={"tasks": planned.resolved_tasks},
        method=last.method,
        plan_digest=planned.digest,
        estimates={"points": len(planned.points), "peak_memory_bytes": planned.peak_memory_bytes},
        warnings=[warning.as_json() for warning in warnings.values()],
        total_bytes=POINT_UNITS * len(planned.points),
        queue=running.queue,
        priority=running.priority,
        owner=owner,
        labels=running.labels,
        max_attempts=settings.max_attempts,
        pinned=running.pinned,
        webhook=None if running.webhook is None else running.webhook.model_dump(mode="json"),
        expires_in=running.expires_in or settings.retention_seconds,
        merges=merges,
        points=[
            NewPoint(
                name=point.name,
                settings=point.settings,
                recipe=point.recipe,
                resolved=point.plan.recipe,
                plan_digest=point.plan.digest,
            )
            for point in planned.points
        ],
    )


def endpoints(kind: Kind, document: type[Evaluation] | type[Sweep]) -> APIRouter:
    """The router of a kind, with everything but what submits; ``document`` is what it answers with."""
    router = APIRouter(prefix=f"/{kind}s", tags=[f"{kind}s"])
    a_job = f"an {kind}" if kind is Kind.EVALUATION else f"a {kind}"
    links_from = FROM_AN_EVALUATION if kind is Kind.EVALUATION else FROM_A_SWEEP
    described = {"headers": JOB_HEADERS, "links": links_from}

    @router.get(
        "",
        name=f"list_{kind}s",
        response_model=ScoringPage,
        summary=f"List {kind}s",
        responses={200: {"headers": {"Link": NEXT_PAGE}}, 422: Problem},
    )
    def list_jobs(
        caller: Reading,
        request: Request,
        response: Response,
        serving: Serving,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(max_length=500, description="The `next_cursor` of the page before")] = None,
        status: Annotated[list[Status] | None, Query(description="May be given several times")] = None,
    ) -> ScoringPage:
        """Your own, newest first; an admin's key sees every owner's. `Link: rel="next"` leads to the next page."""
        page = serving.jobs.list(status=status, limit=limit, cursor=cursor, by=caller, kind=kind)
        link_next(request, response, page)
        return ScoringPage(items=[ScoringSummary.listed(job) for job in page.jobs], next_cursor=page.next_cursor)

    @router.get(
        "/{id}",
        name=f"get_{kind}",
        response_model=document,
        summary=f"Look at {a_job}",
        responses={
            200: described,
            304: {"description": "Nothing changed since that ETag", "headers": JOB_HEADERS},
            404: Problem,
        },
    )
    def get_job(
        caller: Reading, id: Id, serving: Serving, response: Response, if_none_match: IfNoneMatch = None
    ) -> Any:
        """Poll this. `Retry-After` says when it is worth asking again; it is absent once it has finished."""
        job = serving.jobs.get(id, by=caller, kind=kind)
        return unchanged(response, job, if_none_match) or document.of(job, serving.points.of(id))

    @router.get(
        "/{id}/events",
        name=f"{kind}_events",
        response_model=EventPage,
        summary=f"What happened to {a_job}",
        responses=_event_answers(f"{kind}_events"),
    )
    def events(
        caller: Reading,
        id: Id,
        request: Request,
        response: Response,
        serving: Serving,
        after: After = 0,
        limit: Limit = 200,
        last_event_id: LastEventId = None,
    ) -> Any:
        """As those of a merge: a page, or with `Accept: text/event-stream` a stream. `point` says what was scored; the
        progress between them counts thousandths of a point.
        """
        after = after if last_event_id is None else last_event_id
        return events_of(serving, caller, id, kind, request, response, after=after, limit=limit)

    @router.post(
        "/{id}/cancel",
        name=f"cancel_{kind}",
        status_code=202,
        response_model=document,
        summary=f"Cancel {a_job}",
        responses={202: described, 404: Problem, 409: Problem},
    )
    def cancel(caller: Merging, id: Id, serving: Serving, response: Response) -> Any:
        """Idempotent. What is scored by then stays; one that already succeeded or failed is a 409."""
        job = serving.jobs.request_cancel(id, by=caller, kind=kind)
        describe(response, job)
        return document.of(job, serving.points.of(id))

    @router.delete(
        "/{id}",
        name=f"delete_{kind}",
        status_code=204,
        response_class=Response,
        summary=f"Delete {a_job}",
        responses={404: Problem, 409: Problem},
    )
    def delete(caller: Merging, id: Id, serving: Serving) -> None:
        """Removes one that has finished, with its scores. Unfinished ones are a 409: cancel them first."""
        serving.discard(serving.jobs.delete(id, by=caller, kind=kind))

    @router.get(
        "/{id}/webhooks",
        name=f"{kind}_webhooks",
        response_model=DeliveryList,
        summary=f"What was the webhook of {a_job} told?",
        responses={404: Problem},
    )
    def webhooks(caller: Reading, id: Id, serving: Serving) -> DeliveryList:
        """Every delivery with every attempt. Empty before it has ended, and where it has no webhook."""
        return deliveries_of(serving, caller, id, kind)

    return router


def _event_answers(operation: str) -> dict[int | str, dict[str, Any]]:
    """The answers of the endpoint of a job's events, which is called ``operation``."""
    return {
        200: {
            "description": "A page of events; with `Accept: text/event-stream`, those that are there and those to come",
            "content": {
                MEDIA_TYPE: {
                    "schema": {"type": "string"},
                    "example": "id: 7\nevent: point\ndata: {…}\n\nevent: progress\ndata: {…}\n\n",
                }
            },
            "links": links((operation,), id="$request.path.id", after="$response.body#/after"),
        },
        204: {"description": "Of a stream: it has ended, and the client knows all of it. An EventSource stops"},
        404: Problem,
        422: Problem,
        503: {**Problem, "description": "No event stream is free, or the database is away"},
    }
