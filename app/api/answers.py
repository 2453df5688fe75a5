"""What the OpenAPI document says beyond bodies: the headers of requests and answers, and where answers lead (links)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.artifacts.manifest import MANIFEST_NAME

Described = dict[str, Any]


def header(schema_type: str, description: str, *, required: bool = False) -> Described:
    return {"description": description, "required": required, "schema": {"type": schema_type}}


ETAG = header("string", "Names this version; for If-None-Match", required=True)
POLL_AFTER = header("integer", "Seconds until asking again is worth it; absent once it has finished")
JOB_HEADERS = {"ETag": ETAG, "Retry-After": POLL_AFTER}
LOCATION = header("string", "Its own address", required=True)
NEXT_PAGE = header("string", '`<…>; rel="next"` where there is a next page')
SET_COOKIE = header("string", "The session: HttpOnly, SameSite=Strict, over https Secure", required=True)
CHALLENGE = header("string", "RFC 6750: the scope that is missing, or what is wrong with the key")
WAIT = header("integer", "Seconds to wait before the next request", required=True)
DOWNLOAD_HEADERS = {
    "ETag": ETAG,
    "Accept-Ranges": header("string", "bytes", required=True),
    "Content-Length": header("integer", "Bytes of this answer's body", required=True),
}
RANGE_HEADERS = {**DOWNLOAD_HEADERS, "Content-Range": header("string", "`bytes FIRST-LAST/SIZE`", required=True)}
DIGEST = {"Repr-Digest": header("string", "`sha-256=:…:` of the whole file", required=True)}


def asked_by(name: str, description: str, example: str) -> Described:
    """A header of a request that an endpoint reads for itself."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


ASKED_OF_DOWNLOADS = {
    "parameters": [
        asked_by("Range", "One range of bytes; what does not parse is ignored, as RFC 9110 wants", "bytes=0-99"),
        asked_by("If-Range", "The ETag that the range belongs to; all is sent where it is another", '"0"'),
        asked_by("If-None-Match", "The ETag seen last: 304 while it holds", '"0"'),
    ]
}
OF_A_MERGE = ("get_merge", "events", "cancel", "delete", "list_files", "archive", "head_archive", "merge_webhooks")


OF_A_SWEEP = ("get_sweep", "sweep_events", "cancel_sweep", "delete_sweep", "sweep_webhooks", "merge_of_sweep")
OF_AN_EVALUATION = (
    "get_evaluation",
    "evaluation_events",
    "cancel_evaluation",
    "delete_evaluation",
    "evaluation_webhooks",
)
OF_A_FILE = ("download", "head_download")


def links(names: Iterable[str], **parameters: str) -> Described:
    """To operations by their ids, with ``parameters`` that are values or (OpenAPI) runtime expressions."""
    return {name: {"operationId": name, "parameters": parameters} for name in names}


FROM_A_MERGE = {
    **links(OF_A_MERGE, id="$response.body#/id"),
    **links(OF_A_FILE, id="$response.body#/id", path=MANIFEST_NAME),
}
FROM_A_SWEEP = links(OF_A_SWEEP, id="$response.body#/id")
FROM_AN_EVALUATION = links(OF_AN_EVALUATION, id="$response.body#/id")
FROM_FILES = links(OF_A_FILE, id="$request.path.id", path="$response.body#/items/0/name")
