"""Failures as RFC 9457 problem documents: every error of the API leaves through ``problem_response``.

The document has the standard members (``type``, ``title``, ``status``, ``detail``, ``instance``) and ours: ``code``,
``where`` (a place in the recipe or request), ``fault`` (user|system), ``problems`` (all of them) and ``request_id``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from app.errors import NO_SPACE, MergeyardError, Problem
from app.recipe.parse import place

MEDIA_TYPE = "application/problem+json"
REALM = 'Bearer realm="mergeyard"'
SCOPE_CODE = re.compile(r"scope_(\w+)_required")
RETRY_SECONDS = 2  # for what passes by itself: a database or a queue that is being restarted

log = logging.getLogger("mergeyard.api")


def problem_document(error: MergeyardError, *, instance: str, request_id: str) -> dict[str, Any]:
    """The problem document of an error; ``type`` is a stable name, ``title`` never varies for a code."""
    return {
        "type": f"urn:mergeyard:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "instance": instance,
        "code": error.code,
        "where": error.where,
        "fault": error.fault,
        "problems": [problem.as_json() for problem in error.problems],
        "request_id": request_id,
    }


def problem_response(
    error: MergeyardError, *, instance: str, request_id: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The HTTP response of an error, with ``Retry-After`` where waiting helps."""
    document = problem_document(error, instance=instance, request_id=request_id)
    extra = {"Cache-Control": "no-store", **(headers or {})}
    if error.status == 503 or error.code == "too_many_jobs":
        extra.setdefault("Retry-After", str(RETRY_SECONDS))
    if challenge := _challenge(error):
        extra["WWW-Authenticate"] = challenge
    body = json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace")
    return Response(body, status_code=error.status, media_type=MEDIA_TYPE, headers=extra)


def _challenge(error: MergeyardError) -> str:
    """What RFC 6750, section 3, wants beside a key that is missing, wrong or too weak."""
    if error.code == "key_required":
        return REALM
    if error.status == 401:
        return f'{REALM}, error="invalid_token", error_description="{error.title}"'
    scope = SCOPE_CODE.fullmatch(error.code)
    return f'{REALM}, error="insufficient_scope", scope="{scope[1]}"' if scope else ""


def as_mergeyard_error(error: Exception) -> MergeyardError:
    """Any exception as the failure a user may see. What is not expected becomes ``internal``, without its text."""
    if isinstance(error, MergeyardError):
        return error
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return MergeyardError("disk_full", "The service's disk is full; ask its operator to free space.")
    return MergeyardError(
        "internal",
        "Something unexpected happened. Give the request id to the operator: the log has the rest.",
    )


def log_fault(error: MergeyardError, request_id: str) -> None:
    """What is the service's own fault stands in its log, with the id that its user was told."""
    if error.fault == "system":
        log.error("%s: %s (request %s)", error.code, error.message, request_id)


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Register the handlers; ``routes`` are the application's, to say which methods a path has.

    What they do not catch ends in ``middleware.RequestIds``.
    """
    app.add_exception_handler(MergeyardError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, partial(_http, routes))


async def _known(request: Request, error: Exception) -> Response:
    failure = as_mergeyard_error(error)
    log_fault(failure, request.state.request_id)
    return problem_response(
        failure, instance=request.url.path, request_id=request.state.request_id, headers=failure.headers
    )


async def _invalid(request: Request, error: Exception) -> Response:
    """FastAPI's own validation of paths, queries and headers."""
    assert isinstance(error, RequestValidationError)
    problems = [
        Problem(code="request_invalid", message=f"{found['msg']}.", where=place(found["loc"]))
        for found in error.errors()
    ]
    return await _known(request, MergeyardError.of(problems))


async def _http(routes: Sequence[Route], request: Request, error: Exception) -> Response:
    """What the router itself refuses: paths that do not exist, methods that a path does not have."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if error.status_code == 405:
        found = [route for route in routes if route.path_regex.match(path)]
        named = [route for route in found if not route.param_convertors] or found  # /merges/plan is no merge's address
        allowed = ", ".join(sorted(set().union(*(route.methods or () for route in named))))
        headers["Allow"] = allowed  # Starlette names the methods of the first route only
        message = f"{request.method} is not allowed on {path}; allowed: {allowed}."
        failure = MergeyardError("method_not_allowed", message)
    elif error.status_code == 404:
        failure = MergeyardError("not_found", f"There is nothing at {path}; /docs lists what there is.")
    else:
        failure = MergeyardError("request_invalid", str(error.detail))
    return problem_response(failure, instance=path, request_id=request.state.request_id, headers=headers)
