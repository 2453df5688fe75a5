"""/merges: submit, plan, list, look at, cancel and delete."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.api.answers import FROM_A_MERGE, JOB_HEADERS, NEXT_PAGE
from app.api.callers import Merging, Reading
from app.api.envelope import Body, Envelope, Submission, read_submission, submitted
from app.api.examples import schema_of, submission_body
from app.api.jobs import (
    After,
    Asked,
    Id,
    IdempotencyKey,
    IfNoneMatch,
    LastEventId,
    Limit,
    Problem,
    accepted,
    describe,
    event_answers,
    events_of,
    idempotency,
    link_next,
    queue,
    submitted_at,
    unchanged,
)
from app.api.schemas import (
    EventPage,
    Merge,
    MergePage,
    MergePlan,
    MergeSummary,
    estimates,
)
from app.api.service import Service, Serving
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.planning.reuse import reuse_key
from app.records.job import Job, Kind, NewJob, Status
from app.records.key import Caller
from app.settings import Settings

router = APIRouter(prefix="/merges", tags=["merges"])


@router.post(
    "",
    status_code=202,
    response_model=Merge,
    summary="Submit a merge",
    responses=accepted(FROM_A_MERGE),
    openapi_extra=submission_body(schema_of(Envelope)),
)
async def submit(
    caller: Merging,
    body: Body,
    serving: Serving,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Merge:
    """Check the recipe against the real files and queue it. Everything wrong with it is answered at once (422), with
    places; what is accepted (202) reaches exactly one of succeeded, failed, cancelled. Where you have a result of the
    same fingerprint, whose sources nobody has touched since, it has succeeded at once (`reused`); `force` merges anew.
    """
    job = await accept(serving, caller, body, idempotency_key)
    submitted_at(response, job)
    return Merge.of(job)


@router.post(
    "/plan",
    response_model=MergePlan,
    summary="Plan a merge",
    responses={413: Problem, 415: Problem, 422: Problem, 503: Problem},
    openapi_extra=submission_body(schema_of(Envelope)),
)
async def plan(caller: Merging, body: Body, serving: Serving) -> MergePlan:
    """Everything POST /merges would check, and what the merge would take, without queueing anything."""

    return await look_ahead(serving, caller, body)


@router.get(
    "",
    response_model=MergePage,
    summary="List merges",
    responses={200: {"headers": {"Link": NEXT_PAGE}}, 422: Problem},
)
def list_merges(
    caller: Reading,
    request: Request,
    response: Response,
    serving: Serving,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500, description="The `next_cursor` of the page before")] = None,
    status: Annotated[list[Status] | None, Query(description="May be given several times")] = None,
    method: Annotated[str | None, Query(pattern=r"^[a-z0-9_]{1,64}$")] = None,
) -> MergePage:
    """Your own, newest first; an admin's key sees every owner's. `Link: rel="next"` leads to the next page."""
    page = serving.jobs.list(status=status, method=method, limit=limit, cursor=cursor, by=caller)
    link_next(request, response, page)
    return MergePage(items=[MergeSummary.listed(job) for job in page.jobs], next_cursor=page.next_cursor)


@router.get(
    "/{id}",
    response_model=Merge,
    summary="Look at a merge",
    responses={
        200: {"headers": JOB_HEADERS, "links": FROM_A_MERGE},
        304: {"description": "Nothing changed since that ETag", "headers": JOB_HEADERS},
        404: Problem,
    },
)
def get_merge(
    caller: Reading,
    id: Id,
    serving: Serving,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """Poll this. `Retry-After` says when it is worth asking again; it is absent once the merge has finished."""
    job = serving.jobs.get(id, by=caller)
    return unchanged(response, job, if_none_match) or Merge.of(job)


@router.get(
    "/{id}/events",
    response_model=EventPage,
    summary="What happened to a merge",
    responses=event_answers("events", "claimed"),
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
    """Append-only, in order. Ask again with `after` to see what is new, or follow: with `Accept: text/event-stream`
    events are sent as they happen (server-sent events), with progress between them, until the merge has ended.
    """
    after = after if last_event_id is None else last_event_id
    return events_of(serving, caller, id, Kind.MERGE, request, response, after=after, limit=limit)


@router.post(
    "/{id}/cancel",
    status_code=202,
    response_model=Merge,
    summary="Cancel a merge",
    responses={202: {"headers": JOB_HEADERS, "links": FROM_A_MERGE}, 404: Problem, 409: Problem},
)
def cancel(caller: Merging, id: Id, serving: Serving, response: Response) -> Merge:
    """Idempotent. A running merge stops at the next tile; one that already succeeded or failed is a 409."""
    job = serving.jobs.request_cancel(id, by=caller)
    describe(response, job)
    return Merge.of(job)


@router.delete(
    "/{id}", status_code=204, response_class=Response, summary="Delete a merge", responses={404: Problem, 409: Problem}
)
def delete(caller: Merging, id: Id, serving: Serving) -> None:
    """Removes a finished merge, and its files unless other merges have them too. Unfinished ones are a 409: cancel them
    first. So is one that an alias points to or an unfinished merge reads (`merge_in_use`).
    """
    serving.discard(serving.jobs.delete(id, by=caller))


async def look_ahead(serving: Service, caller: Caller, body: tuple[str, bytes]) -> MergePlan:
    """The plan of what ``accept`` would queue. Raises MergeyardError with every problem."""

    def planned() -> MergePlan:
        submission = read_submission(*body, serving.webhook_hosts)
        return MergePlan.of(make_plan(submission.recipe, serving.resolver(caller.owner)))

    return await serving.planning.take(planned)


async def accept(serving: Service, caller: Caller, body: tuple[str, bytes], key: str | None = None) -> Job:
    """Check and queue what was submitted: a media type and the bytes of an envelope or a recipe.

    Raises MergeyardError with every problem.
    """
    return await queue(serving, caller, lambda: _asked(serving, caller, body, key))


async def rerun(serving: Service, caller: Caller, job: Job, *, force: bool) -> Job:
    """A new merge of the job's recipe, submitted by the caller as that one was. Raises what ``accept`` raises."""
    asked = {"queue": job.queue, "priority": job.priority, "labels": dict(job.labels), "pinned": job.pinned}
    left_out = {"webhook": job.webhook, "expires_in": job.expires_in}
    given = {name: value for name, value in left_out.items() if value is not None}
    envelope = {"recipe": job.recipe, **asked, **given, "force": force}
    return await accept(serving, caller, ("application/json", json.dumps(envelope).encode()))


def _asked(serving: Service, caller: Caller, body: tuple[str, bytes], key: str | None) -> Asked:
    """The job to submit, its key and the artifact that it may reuse; or the job that the Idempotency-Key has made.

    That is looked up before planning: a retry must find its merge even where the files have changed or gone since.
    """
    submission = read_submission(*body, serving.webhook_hosts)
    made_by = idempotency(caller.owner, key, submission.canonical())
    earlier = serving.jobs.earlier(made_by) if made_by else None
    if earlier is not None:
        return earlier
    merges: set[str] = set()
    plan = make_plan(submission.recipe, serving.resolver(caller.owner, merges))
    new = _new_job(submission, plan, caller.owner, serving.settings, merges)
    reuse = None if submission.envelope.force else serving.reusable(new)
    return new, made_by, reuse


def _new_job(submission: Submission, plan: Plan, owner: str, settings: Settings, merges: Collection[str]) -> NewJob:
    """``merges``: the ids of those that the plan reads."""
    envelope = submission.envelope
    return NewJob(
        recipe=submitted(submission.recipe),
        resolved=plan.recipe,
        method=plan.method,
        plan_digest=plan.digest,
        estimates=estimates(plan),
        warnings=[warning.as_json() for warning in plan.warnings],
        total_bytes=plan.estimates.disk_bytes,
        owner=owner,
        max_attempts=settings.max_attempts,
        **envelope.wanted(settings.retention_seconds),
        merges=merges,
        reuse_key=reuse_key(plan),
    )
