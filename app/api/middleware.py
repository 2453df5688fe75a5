"""What wraps every request: its figures, an id, a bound on its body, and the last catch before the server.

Plain ASGI, not Starlette's BaseHTTPMiddleware, which would put a queue between a download and its socket.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.api.errors import as_mergeyard_error, problem_response
from app.errors import MergeyardError

REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)

log = logging.getLogger("mergeyard.api")


class Measured:
    """Counts every answer, and measures how long it took to begin: the rest of a download is the network's time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def send_measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Templates and not paths: whoever asks must not be able to make up new series.
                route = getattr(scope.get("route"), "path_format", "none")
                seconds = time.perf_counter() - began
                scope["app"].state.service.figures.note(scope["method"], route, message["status"], seconds)
            await send(message)

        await self._app(scope, receive, send_measured)


class RequestIds:
    """Gives a request its id (the caller's, where that is sane) and turns what nobody caught into ``internal``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted if REQUEST_ID.fullmatch(wanted) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        logs.about(request=request_id)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            failure = as_mergeyard_error(error)
            log.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            if started:
                raise  # the server cuts the connection, so the caller sees that the body is not whole
            response = problem_response(failure, instance=scope["path"], request_id=request_id)
            await response(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body over its limit with ``body_too_large``: by its Content-Length before a byte is read, and while it
    streams where the length is not announced or a lie. ``limits`` are by path; every other path has ``default``.
    """

    def __init__(self, app: ASGIApp, *, default: int, limits: Mapping[str, int]) -> None:
        self._app, self._default, self._limits = app, default, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], self._default)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            # No "Connection: close": the server then discards the body, so that clients which send all of it before
            # they read (urllib, requests) still see this answer instead of a reset connection.
            request_id = scope["state"]["request_id"]
            response = problem_response(_too_large(limit), instance=scope["path"], request_id=request_id)
            await response(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, receive_bounded, send)


def _too_large(limit: int) -> MergeyardError:
    return MergeyardError("body_too_large", f"The request body is larger than the {limit:,} bytes accepted here.")
