"""The gate: every request but those of ``OPEN`` has a known caller before any of its body is read.

Here and not in each endpoint, so that a path which nobody thought of is closed.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.service import Service
from app.errors import MergeyardError

# Probes carry no keys: /healthz and /readyz say which part works, and nothing about anybody's merges. The API's
# description is as public as the package that it comes with.
OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})


class Gate:
    """Puts the Caller into ``request.state.caller``, or answers why not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        service: Service = scope["app"].state.service
        request_id, client = scope["state"]["request_id"], (scope["client"] or (None,))[0]
        headers = Headers(scope=scope)
        try:
            caller = await run_in_threadpool(service.callers.recognise, scope["method"], headers, client, request_id)
        except MergeyardError as error:
            response = problem_response(error, instance=scope["path"], request_id=request_id)
            await response(scope, receive, send)
            return
        scope["state"]["caller"] = caller
        await self._app(scope, receive, send)
