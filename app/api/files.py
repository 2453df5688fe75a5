"""/merges/{id}/files and archive.tar. File names are looked up in the record, never joined to a path."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.archive import tar_segments
from app.api.callers import Reading
from app.api.merges import Id, Problem
from app.api.schemas import FileList
from app.api.service import Service, Serving
from app.api.transfer import Stored, serve
from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.key import Caller

# Everything else goes out as bytes: a browser must never run what came with somebody's model.
CONTENT_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: {"description": "All of it", "content": {"application/octet-stream": {}}},
    206: {"description": "The range that was asked for"},
    304: {"description": "The ETag still holds"},
    404: Problem,
    409: Problem,
    416: Problem,
}

router = APIRouter(prefix="/merges/{id}", tags=["files"])


@router.get("/files", response_model=FileList, summary="List the files", responses={404: Problem, 409: Problem})
def list_files(caller: Reading, id: Id, serving: Serving, response: Response) -> FileList:
    """The artifact's files with their sizes and digests. 409 until the merge has succeeded."""
    job, files = serving.published(id, caller)
    assert job.artifact is not None
    manifest_sha256 = job.artifact["manifest_sha256"]
    response.headers["ETag"] = f'"{manifest_sha256}"'
    return FileList.of(id, files, manifest_sha256)


@router.get("/files/{path:path}", response_class=Response, summary="Download a file", responses=DOWNLOAD)
@router.head("/files/{path:path}", response_class=Response, summary="Look at a file", responses=DOWNLOAD)
async def download(caller: Reading, id: Id, path: str, request: Request, serving: Serving) -> Response:
    """Takes Range, If-Range and If-None-Match; `ETag` is the quoted sha256, `Repr-Digest` the same in base64."""
    _, files = await run_in_threadpool(serving.published, id, caller)
    file = files.get(path)
    if file is None:
        raise MergeyardError("not_found", f"The merge has no file of that name; GET /merges/{id}/files lists them.")
    return await send_file(request, serving, caller, id, file)


@router.get("/archive.tar", response_class=Response, summary="Download everything as one tar", responses=DOWNLOAD)
@router.head("/archive.tar", response_class=Response, summary="Look at the tar", responses=DOWNLOAD)
async def archive(caller: Reading, id: Id, request: Request, serving: Serving) -> Response:
    """Streamed with its exact length, resumable like any file; the same artifact always gives the same bytes."""
    job, files = await run_in_threadpool(serving.published, id, caller)
    assert job.artifact is not None
    headers = {
        "Content-Type": "application/x-tar",
        "Content-Disposition": f'attachment; filename="{id}.tar"',
    }
    etag = f'"tar-{job.artifact["manifest_sha256"]}"'
    response = await serve(request, tar_segments(files.values()), serving.store, etag=etag, headers=headers)
    return await _recorded(response, request, serving, caller, id, "archive.tar")


async def send_file(
    request: Request,
    serving: Service,
    caller: Caller,
    id: str,
    file: StoredFile,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A file of the merge ``id``, whole or in part, under whichever path it was asked for."""
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    described = {
        "Content-Type": CONTENT_TYPES.get(PurePosixPath(file.name).suffix, "application/octet-stream"),
        "Repr-Digest": f"sha-256=:{digest}:",
        **(headers or {}),
    }
    etag = f'"{file.sha256}"'
    response = await serve(request, [Stored(file.key, file.size)], serving.store, etag=etag, headers=described)
    return await _recorded(response, request, serving, caller, id, file.name)


async def _recorded(
    response: Response, request: Request, serving: Service, caller: Caller, id: str, name: str
) -> Response:
    """The response, after the audit says who is about to get bytes of which file."""
    if request.method == "GET" and response.status_code in (200, 206):
        data = {"file": name, "range": request.headers.get("range", "")[:100]}
        await run_in_threadpool(serving.audit.add, caller, "downloaded", id, data)
    return response
