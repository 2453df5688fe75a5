"""What goes wrong with a request: one exception, and a kind of it for whatever a caller may want to tell apart."""

from __future__ import annotations

from typing import TypedDict

import httpx


class Problem(TypedDict):
    code: str
    message: str
    where: str


class ApiError(Exception):
    """A request that failed.

    ``code`` is the service's (docs/api.md), or one of the client's own: ``unreachable``, ``unexpected_response``,
    ``digest_mismatch``, ``output_exists``, ``unsafe_name``. ``detail`` says what to do, ``where`` is the place in the
    recipe, and ``problems`` are all that were found. ``status`` is the HTTP status, 0 where there was no answer.
    ``fault`` is ``user`` where another request would help. ``repeated`` tells that it was not the first try.
    """

    def __init__(
        self,
        code: str,
        status: int,
        detail: str,
        where: str = "",
        problems: list[Problem] | None = None,
        *,
        fault: str = "system",
        request_id: str = "",
        repeated: bool = False,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = status
        self.detail = detail
        self.where = where
        self.problems: list[Problem] = problems or [{"code": code, "message": detail, "where": where}]
        self.fault = fault
        self.request_id = request_id
        self.repeated = repeated


class InvalidRequestError(ApiError):
    """The recipe or the request is wrong; ``problems`` has every place (413, 415, 416, 422)."""


class AccessError(ApiError):
    """The key is missing, wrong, or opens too little (401, 403)."""


class NotFoundError(ApiError):
    """There is no such merge, alias or file, or it is another owner's (404)."""


class ConflictError(ApiError):
    """The state of the merge does not allow it (409)."""


class RateLimitedError(ApiError):
    """Too many requests, streams or merges, still after the pauses that the service asked for (429)."""


class UnavailableError(ApiError):
    """The service or a part of it cannot be reached, or has no room, still after all tries (0, 502, 503, 504, 507)."""


class DownloadError(ApiError):
    """What was fetched is not what it should be, or may not be written where it belongs. None of it was kept."""


KINDS: dict[int, type[ApiError]] = {
    0: UnavailableError,
    401: AccessError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    416: InvalidRequestError,
    422: InvalidRequestError,
    429: RateLimitedError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
    507: UnavailableError,
}


def read_error(response: httpx.Response, *, repeated: bool = False) -> ApiError:
    """The error in a response: its problem document, or ``unexpected_response`` (a proxy's page, another service)."""
    request_id = response.headers.get("x-request-id", "")
    status = response.status_code
    kind = KINDS.get(status, ApiError)
    try:
        document = response.json()
        return kind(
            document["code"],
            status,
            document["detail"],
            document.get("where", ""),
            document.get("problems"),
            fault=document.get("fault", "system"),
            request_id=request_id,
            repeated=repeated,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        detail = f"{response.request.url} answered {status}, and not as Mergeyard does; check the URL."
        kind = kind if kind is UnavailableError else ApiError
        return kind("unexpected_response", status, detail, request_id=request_id, repeated=repeated)
