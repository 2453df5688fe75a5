"""/uploads: a model's or an adapter's files over HTTP, straight from the socket into the upload store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from anyio import CapacityLimiter, from_thread, to_thread
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from app.api.callers import Merging
from app.api.jobs import Problem
from app.api.multipart import boundary_of, file_parts
from app.api.schemas import UploadDocument
from app.api.service import Service, Serving
from app.errors import MergeyardError
from app.records.key import Caller
from app.sources.uploads import Upload

BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["files"],
                }
            }
        },
    }
}

router = APIRouter(prefix="/uploads", tags=["sources"])


@router.post(
    "",
    status_code=201,
    response_model=UploadDocument,
    summary="Upload a model or an adapter",
    responses={
        200: {"description": "The same files were there already", "model": UploadDocument},
        413: Problem,
        415: Problem,
        422: Problem,
        507: Problem,
    },
    openapi_extra=BODY,
)
async def upload(caller: Merging, request: Request, serving: Serving, response: Response) -> UploadDocument:
    """One model or one adapter: all its files as multipart form data. Kept by the digest of its contents, so the same
    files always have the same reference.
    """
    boundary = boundary_of(request.headers.get("content-type", ""))
    limiter: CapacityLimiter = request.app.state.upload_limiter
    try:
        # A thread of its own kind: slow uploads must not take those that answer everything else.
        await to_thread.run_sync(_check_announced, serving, caller, request)
        made, first = await to_thread.run_sync(_store, serving, caller, boundary, request.stream(), limiter=limiter)
    except ClientDisconnect:
        raise MergeyardError("request_invalid", "The upload ended before it was complete; send it again.") from None
    response.status_code = 201 if first else 200
    return UploadDocument.of(made)


def _check_announced(serving: Service, caller: Caller, request: Request) -> None:
    """Refuse what the quota has no room for before it is received."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit():
        serving.quotas.check_upload(caller.owner, int(announced), serving.limits_of(caller))


def _store(serving: Service, caller: Caller, boundary: bytes, stream: AsyncIterator[bytes]) -> tuple[Upload, bool]:
    """Runs in a thread; pulls the body from the event loop piece by piece, so nothing piles up in memory.

    True where this owner had not sent these files before. Not by what is stored: nobody learns here what others have.
    """
    draft = serving.uploads.begin()
    try:
        for name, chunks in file_parts(_pull(stream), boundary):
            draft.add(name, chunks)
        made = draft.check()
        # Owned first: what is in its place without an owner would be nobody's to delete.
        first = serving.uploaded.add(made, by=caller, limits=serving.limits_of(caller))
        draft.commit(made)
        return made, first
    finally:
        draft.discard()


def _pull(stream: AsyncIterator[bytes]) -> Iterator[bytes]:
    async def following() -> bytes | None:
        return await anext(stream, None)

    while (piece := from_thread.run(following)) is not None:
        yield piece
