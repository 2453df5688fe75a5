"""What sweeps and evaluations have in common: jobs whose result are scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.api.answers import FROM_A_SWEEP, FROM_AN_EVALUATION, JOB_HEADERS, NEXT_PAGE
from app.api.callers import Merging, Reading
from app.api.envelope import Running, canonical
from app.api.jobs import (
    After,
    Asked,
    Id,
    IfNoneMatch,
    LastEventId,
    Limit,
    Problem,
    describe,
    event_answers,
    events_of,
    idempotency,
    link_next,
    unchanged,
)
from app.api.schemas import EventPage
from app.api.scoring_schemas import Evaluation, ScoringPage, ScoringSummary, Sweep
from app.api.service import Service, Serving
from app.api.webhooks import DeliveryList, deliveries_of
from app.recipe.evaluation import TaskEntry
from app.records.job import POINT_UNITS, Kind, NewJob, NewPoint, Status
from app.records.key import Caller
from app.settings import Settings
from app.sources.resolver import Resolver
from app.sweeps.planning import PlannedSweep


def ask(
    serving: Service,
    caller: Caller,
    kind: Kind,
    running: Running,
    asked: Mapping[str, Any],
    key: str | None,
    plan: Callable[[Resolver], PlannedSweep],
) -> Asked:
    """The job to submit and its key, or the job that the Idempotency-Key has made. ``asked``: what ``running`` is of.

    Raises what ``plan`` raises.
    """
    made_by = idempotency(caller.owner, key, canonical({**running.canonical(), **asked, "kind": kind}))
    earlier = serving.jobs.earlier(made_by) if made_by else None
    if earlier is not None:
        return earlier
    merges: set[str] = set()
    planned = plan(serving.resolver(caller.owner, merges))
    new = new_job(kind, asked, running, planned, owner=caller.owner, settings=serving.settings, merges=merges)
    return new, made_by, None


def as_sent(tasks: Sequence[TaskEntry]) -> list[dict[str, Any]]:
    """What was written of each task, and no defaults."""
    return [task.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for task in tasks]


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
    warnings = {(item.code, item.where): item for point in planned.points for item in point.warnings}
    return NewJob(
        kind=kind,
        recipe=asked,
        resolved={"tasks": planned.resolved_tasks},
        method=planned.points[-1].method,
        plan_digest=planned.digest,
        estimates={"points": len(planned.points), "peak_memory_bytes": planned.peak_memory_bytes},
        warnings=[warning.as_json() for warning in warnings.values()],
        total_bytes=POINT_UNITS * len(planned.points),
        owner=owner,
        max_attempts=settings.max_attempts,
        **running.wanted(settings.retention_seconds),
        merges=merges,
        points=[
            NewPoint(
                name=point.name,
                settings=point.settings,
                recipe=point.recipe,
                resolved=point.resolved,
                plan_digest=point.plan_digest,
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
        responses=event_answers(f"{kind}_events", "point"),
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
