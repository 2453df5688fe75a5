"""What all kinds of jobs have in common: how they are queued, looked at, followed, and how they are described."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.api.answers import JOB_HEADERS, LOCATION, links
from app.api.eventstream import MEDIA_TYPE, PAGE, EventStream, wants_stream
from app.api.limits import network
from app.api.ranges import none_match
from app.api.schemas import EventPage, MergeEvent, ProblemDocument, job_url
from app.api.service import Service
from app.errors import MergeyardError
from app.records.following import Standing
from app.records.job import Idempotency, Job, Kind, NewJob, Page
from app.records.key import Caller

POLL_SECONDS = 1  # Retry-After of an unfinished job; a worker writes its progress at most twice a second
KEY = re.compile(r"[\x21-\x7e]{1,255}")

Id = Annotated[str, Path(pattern=r"^[\w.-]{1,96}$", description="The id that the POST answered with")]
IdempotencyKey = Annotated[
    str | None, Header(description="Makes a retry safe: the same key and request give the same answer")
]
IfNoneMatch = Annotated[str | None, Header(description="The ETag seen last: 304 while nothing changed")]
After = Annotated[int, Query(ge=0, lt=1 << 62, description="Only events with a greater id")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Of a page; a stream has no end but the job's")]
LastEventId = Annotated[
    int | None, Header(ge=0, lt=1 << 62, description="As `after`, and before it: what an EventSource sends")
]
Problem: dict[str, Any] = {"model": ProblemDocument}

Asked = Job | tuple[NewJob, Idempotency | None, str | None]  # a job that is there, or one to queue


def accepted(leads_to: Mapping[str, Any], *others: int) -> dict[int | str, dict[str, Any]]:
    """The answers of an endpoint that submits a job; ``leads_to``: links; ``others``: statuses
    beside those that all of them have."""
    return {
        202: {"headers": {**JOB_HEADERS, "Location": LOCATION}, "links": leads_to},
        **dict.fromkeys(sorted((*others, 413, 415, 422, 429, 503, 507)), Problem),
    }


def event_answers(operation: str, happened: str) -> dict[int | str, dict[str, Any]]:
    """The answers of the endpoint of a job's events, which is called ``operation``; one of them is ``happened``."""
    return {
        200: {
            "description": "A page of events; with `Accept: text/event-stream`, those that are there and those to come",
            "content": {
                MEDIA_TYPE: {
                    "schema": {"type": "string"},
                    "example": f"id: 7\nevent: {happened}\ndata: {{…}}\n\nevent: progress\ndata: {{…}}\n\n",
                }
            },
            "links": links((operation,), id="$request.path.id", after="$response.body#/after"),
        },
        204: {"description": "Of a stream: it has ended, and the client knows all of it. An EventSource stops"},
        404: Problem,
        422: Problem,
        503: {**Problem, "description": "No event stream is free, or the database is away"},
    }


async def queue(serving: Service, caller: Caller, ask: Callable[[], Asked]) -> Job:
    """Plan in a turn (``ask``: the job to submit, its key, and the artifact that it may reuse), and queue the job."""
    asked = await serving.planning.take(ask)
    return asked if isinstance(asked, Job) else await run_in_threadpool(_queue, serving, caller, *asked)


def idempotency(owner: str, key: str | None, canonical: bytes) -> Idempotency | None:
    """The Idempotency-Key of a request; ``canonical``: the same bytes for requests that mean the same."""
    if key is None:
        return None
    if not KEY.fullmatch(key):
        message = "An Idempotency-Key is 1 to 255 printable ASCII characters without spaces."
        raise MergeyardError("request_invalid", message, where="header.Idempotency-Key")
    return Idempotency(owner=owner, key=key, request_hash=hashlib.sha256(canonical).hexdigest())


def unchanged(response: Response, job: Job, if_none_match: str | None) -> Response | None:
    """Describe the answer; the one that says that nothing has changed, where nothing has."""
    describe(response, job)
    if not none_match(if_none_match, _etag(job)):
        return None
    answer = Response(status_code=304)
    describe(answer, job)
    return answer


def submitted_at(response: Response, job: Job) -> None:
    """The headers of the answer to a submission."""
    response.headers["Location"] = job_url(job)
    describe(response, job)


def describe(response: Response, job: Job) -> None:
    """The headers of a job's document."""
    response.headers["ETag"] = _etag(job)
    response.headers["Cache-Control"] = "private, no-cache"
    if not job.status.finished:
        response.headers["Retry-After"] = str(POLL_SECONDS)


def link_next(request: Request, response: Response, page: Page) -> None:
    """The Link to the page after this one, if there is one."""
    if page.next_cursor:
        kept = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
        query = urlencode([*kept, ("cursor", page.next_cursor)])
        response.headers["Link"] = f'<{request.url.path}?{query}>; rel="next"'


def events_of(
    serving: Service,
    caller: Caller,
    job_id: str,
    kind: Kind,
    request: Request,
    response: Response,
    *,
    after: int,
    limit: int,
) -> Response | EventPage:
    """A page of a job's events, or their stream where that is asked for."""
    if wants_stream(request.headers.get("accept", "")):
        return _stream(serving, caller, job_id, kind, request, after)
    response.headers["Vary"] = "Accept"
    found = serving.jobs.events(job_id, after=after, limit=limit, by=caller, kind=kind)
    return EventPage(items=[MergeEvent.of(event) for event in found], after=found[-1].id if found else after)


def _stream(serving: Service, caller: Caller, job_id: str, kind: Kind, request: Request, after: int) -> Response:
    # The job before its events: whatever it says of its end is in them.
    job = serving.jobs.get(job_id, by=caller, kind=kind)
    first = serving.jobs.events(job_id, after=after, limit=PAGE, kind=kind)
    if job.status.finished and not first:
        return Response(status_code=204)
    address = request.client.host if request.client else None
    return EventStream(
        serving.streams,
        job_id,
        who=caller.key_id or network(address),
        after=after,
        standing=Standing.of(job),
        first=first,
        read_on=lambda number: serving.jobs.events(job_id, after=number, limit=PAGE, kind=kind),
        limiter=request.app.state.catch_up_limiter,
    )


def _queue(serving: Service, caller: Caller, new: NewJob, key: Idempotency | None, reuse: str | None) -> Job:
    limits = serving.limits_of(caller)
    job, created = serving.jobs.submit(new, idempotency=key, reuse=reuse, by=caller, limits=limits)
    if created and not job.status.finished:
        serving.ring(job)
    return job


def _etag(job: Job) -> str:
    return f'W/"{job.version}"'
