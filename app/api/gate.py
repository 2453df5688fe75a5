"""The gate: every request but those of ``OPEN`` has a known caller before any of its body is read.

Here and not in each endpoint, so that a path which nobody thought of is closed.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.api.callers import Presented, presented
from app.api.errors import log_fault, problem_response
from app.api.limits import NO_LIMIT, Quota
from app.api.service import Service
from app.errors import MergeyardError
from app.records.key import Caller

# Probes carry no keys: /healthz and /readyz say which part works, and nothing about anybody's merges. The API's
# description is as public as the package that it comes with, and so are the files of its pages. Where one signs in one
# has no session yet; / only leads to the pages.
OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json", "/", "/ui/sign-in"})
OPEN_BELOW = "/ui/static/"


class Gate:
    """Puts the Caller into ``request.state.caller``, or answers why not. Counts requests, and says what is left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(OPEN_BELOW):
            await self._app(scope, receive, send)
            return
        request = presented(scope)
        answer, quota = await run_in_threadpool(admit, scope["app"].state.service, request)

        async def send_with_quota(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(quota.headers)
            await send(message)

        if isinstance(answer, Caller):
            scope["state"]["caller"] = answer
            logs.about(owner=answer.owner)
            await self._app(scope, receive, send_with_quota)
            return
        log_fault(answer, request.request_id)
        response = problem_response(
            answer, instance=scope["path"], request_id=request.request_id, headers=_waiting(quota)
        )
        await response(scope, receive, send_with_quota)


def admit(service: Service, request: Presented) -> tuple[Caller | MergeyardError, Quota]:
    """The caller, or why there is none, and what is left of their quota. Nobody is counted while there are no keys."""
    try:
        caller = service.callers.recognise(request)
    except MergeyardError as error:
        text = request.bearer if request.bearer is not None else request.cookie
        if error.status != 401 or text is None or error.code == "key_required":
            return error, NO_LIMIT
        service.failures.note(error.code, text, address=request.address, request_id=request.request_id)
        quota = service.limits.of_failure(request.address)
        return (error if quota.retry_after is None else _too_many(quota)), quota
    if caller.key_id is None:
        return caller, NO_LIMIT
    quota = service.limits.of_key(caller.key_id, writes=request.writes)
    return (caller if quota.retry_after is None else _too_many(quota)), quota


def _too_many(quota: Quota) -> MergeyardError:
    message = f"Too many requests in a minute; send the next one in {quota.retry_after} s. The RateLimit header counts."
    return MergeyardError("rate_limited", message)


def _waiting(quota: Quota) -> Mapping[str, str]:
    return {} if quota.retry_after is None else {"Retry-After": str(quota.retry_after)}
