"""/merges/{id}/files and archive.tar. File names are looked up in the record, never joined to a path."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.answers import ASKED_OF_DOWNLOADS, DIGEST, DOWNLOAD_HEADERS, ETAG, FROM_FILES, RANGE_HEADERS
from app.api.archive import tar_segments
from app.api.callers import Reading
from app.api.jobs import Id, Problem
from app.api.schemas import FileList
from app.api.service import Service, Serving
from app.api.transfer import HandedOver, Segment, Stored, Transfer, serve
from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.key import Caller

# Everything else goes out as bytes: a browser must never run what came with somebody's model.
CONTENT_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
OTHER_FILES = "application/octet-stream"
TAR = "application/x-tar"


def answers(media_types: Collection[str], headers: Mapping[str, Any] = MappingProxyType({})) -> dict[int | str, Any]:
    """The OpenAPI responses of a download that has one of these media types, and ``headers`` of its own."""
    content: dict[str, Any] = {media_type.partition(";")[0]: {} for media_type in media_types}
    return {
        200: {"description": "All of it", "content": content, "headers": {**DOWNLOAD_HEADERS, **headers}},
        206: {"description": "The range asked for", "content": content, "headers": {**RANGE_HEADERS, **headers}},
        304: {"description": "The ETag still holds", "headers": {"ETag": ETAG}},
        307: {"description": "The bytes are at `Location`, for an hour (MERGEYARD_S3_DOWNLOADS=redirect)"},
        404: Problem,
        409: Problem,
        416: Problem,
    }


FILE = answers((*CONTENT_TYPES.values(), OTHER_FILES), DIGEST)
ARCHIVE = answers((TAR,))

router = APIRouter(prefix="/merges/{id}", tags=["files"])


@router.get(
    "/files",
    response_model=FileList,
    summary="List the files",
    responses={200: {"headers": {"ETag": ETAG}, "links": FROM_FILES}, 404: Problem, 409: Problem},
)
def list_files(caller: Reading, id: Id, serving: Serving, response: Response) -> FileList:
    """The artifact's files with their sizes and digests. 409 until the merge has succeeded."""
    job, files = serving.published(id, caller)
    assert job.artifact is not None
    manifest_sha256 = job.artifact["manifest_sha256"]
    response.headers["ETag"] = f'"{manifest_sha256}"'
    return FileList.of(id, files, manifest_sha256)


@router.get(
    "/files/{path:path}",
    response_class=Response,
    summary="Download a file",
    responses=FILE,
    openapi_extra=ASKED_OF_DOWNLOADS,
)
@router.head(
    "/files/{path:path}",
    response_class=Response,
    summary="Look at a file",
    responses=FILE,
    openapi_extra=ASKED_OF_DOWNLOADS,
)
async def download(caller: Reading, id: Id, path: str, request: Request, serving: Serving) -> Response:
    """Takes Range, If-Range and If-None-Match; `ETag` is the quoted sha256, `Repr-Digest` the same in base64."""
    _, files = await run_in_threadpool(serving.published, id, caller)
    file = files.get(path)
    if file is None:
        raise MergeyardError("not_found", f"The merge has no file of that name; GET /merges/{id}/files lists them.")
    return await send_file(request, serving, caller, id, file, redirects=True)


@router.get(
    "/archive.tar",
    response_class=Response,
    summary="Download everything as one tar",
    responses=ARCHIVE,
    openapi_extra=ASKED_OF_DOWNLOADS,
)
@router.head(
    "/archive.tar",
    response_class=Response,
    summary="Look at the tar",
    responses=ARCHIVE,
    openapi_extra=ASKED_OF_DOWNLOADS,
)
async def archive(caller: Reading, id: Id, request: Request, serving: Serving) -> Response:
    """Streamed with its exact length, resumable like any file; the same artifact always gives the same bytes."""
    job, files = await run_in_threadpool(serving.published, id, caller)
    assert job.artifact is not None
    headers = {
        "Content-Type": TAR,
        "Content-Disposition": f'attachment; filename="{id}.tar"',
    }
    etag = f'"tar-{job.artifact["manifest_sha256"]}"'
    sent = _Sent(id, "archive.tar", tar_segments(files.values()))
    return await _send(request, serving, caller, sent, etag=etag, headers=headers)


async def send_file(
    request: Request,
    serving: Service,
    caller: Caller,
    id: str,
    file: StoredFile,
    headers: Mapping[str, str] | None = None,
    *,
    redirects: bool = False,
) -> Response:
    """A file of the merge ``id``, whole or in part, under whichever path it was asked for.

    ``redirects``: to the bucket, where there is one and the operator wants it. Hub clients never: they send their token
    along to another port of the same host.
    """
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    described = {
        "Content-Type": CONTENT_TYPES.get(PurePosixPath(file.name).suffix, OTHER_FILES),
        "Repr-Digest": f"sha-256=:{digest}:",
        **(headers or {}),
    }
    sent = _Sent(id, file.name, [Stored(file.key, file.size)], redirects)
    return await _send(request, serving, caller, sent, etag=f'"{file.sha256}"', headers=described)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What is sent of which merge, and what it is called."""

    merge: str
    name: str
    segments: Sequence[Segment]
    redirects: bool = False


async def _send(
    request: Request, serving: Service, caller: Caller, sent: _Sent, *, etag: str, headers: Mapping[str, str]
) -> Response:
    """The response, after the audit says who is about to get bytes of which file."""
    try:
        response = await serve(
            request,
            sent.segments,
            serving.store,
            etag=etag,
            headers=headers,
            accel=serving.settings.accel_redirect,
            redirects=sent.redirects and serving.settings.s3_downloads == "redirect",
        )
    except FileNotFoundError:
        await run_in_threadpool(serving.jobs.get, sent.merge, by=caller)  # not_found: it was deleted a moment ago
        raise
    if isinstance(response, Transfer | HandedOver):
        data = {"file": sent.name, "range": request.headers.get("range", "")[:100]}
        try:
            await run_in_threadpool(serving.audit.add, caller, "downloaded", sent.merge, data)
        except MergeyardError:
            if isinstance(response, Transfer):
                await run_in_threadpool(response.close)
            raise
    return response
