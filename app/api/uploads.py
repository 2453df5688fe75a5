"""/uploads: a model's or an adapter's files over HTTP, straight from the socket into the upload store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from anyio import CapacityLimiter, from_thread, to_thread
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from app.api.callers import Merging
from app.api.merges import Problem
from app.api.multipart import boundary_of, file_parts
from app.api.schemas import UploadDocument
from app.api.service import Serving
from app.errors import MergeyardError
from app.sources.uploads import Upload, UploadStore

BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
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
    responses={200: {"description": "The same files were there already"}, 413: Problem, 415: Problem, 422: Problem},
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
        made = await to_thread.run_sync(_store, serving.uploads, boundary, request.stream(), limiter=limiter)
    except ClientDisconnect:
        raise MergeyardError("request_invalid", "The upload ended before it was complete; send it again.") from None
    # By what this owner has sent before, not by what is stored: nobody learns here what others have.
    first = await to_thread.run_sync(lambda: serving.uploaded.add(made.digest, by=caller))
    response.status_code = 201 if first else 200
    return UploadDocument.of(made)


def _store(store: UploadStore, boundary: bytes, stream: AsyncIterator[bytes]) -> Upload:
    """Runs in a thread; pulls the body from the event loop piece by piece, so nothing piles up in memory."""
    draft = store.begin()
    try:
        for name, chunks in file_parts(_pull(stream), boundary):
            draft.add(name, chunks)
        return draft.commit()
    finally:
        draft.discard()


def _pull(stream: AsyncIterator[bytes]) -> Iterator[bytes]:
    async def following() -> bytes | None:
        return await anext(stream, None)

    while (piece := from_thread.run(following)) is not None:
        yield piece
