"""Bytes on their way out: a representation made of pieces of stored files, served whole or in part."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO

from anyio import CancelScope, to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from app.api.errors import problem_response
from app.api.ranges import NotSatisfiableError, if_range_allows, none_match, parse_range
from app.artifacts.store import LocalStore
from app.errors import MergeyardError

# Read in MB, not in Starlette's 64 kB: a fourth of nginx's throughput against all of it (service-notes.md, Storage).
PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """All of a stored file."""

    key: str
    size: int


Segment = bytes | Stored


async def serve(
    request: Request, segments: Sequence[Segment], store: LocalStore, *, etag: str, headers: Mapping[str, str]
) -> Response:
    """Answer GET or HEAD with the segments in a row: 200, 206, 304 or 416.

    ``etag`` is strong and quoted. HEAD ignores Range, as RFC 9110 14.2 wants.
    """
    size = sum(_length(segment) for segment in segments)
    common = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-transform", **headers}
    if none_match(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=common)
    if request.method == "HEAD":
        return Response(headers={**common, "Content-Length": str(size)})
    wanted: tuple[int, int] | None = None
    if if_range_allows(request.headers.get("if-range"), etag):
        try:
            wanted = parse_range(request.headers.get("range"), size)
        except NotSatisfiableError:
            return _not_satisfiable(request, size)
    start, end = wanted or (0, size)
    status, extra = 200, {"Content-Length": str(end - start)}
    if wanted:
        status, extra["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
    await to_thread.run_sync(_check_sizes, store, segments)
    body = _read(store, segments, start, end)
    return _Transfer(body, status_code=status, headers={**common, **extra})


class _Transfer(StreamingResponse):
    """Closes its body however it ends: a reader that goes away between two pieces must not leave a file open."""

    body_iterator: AsyncGenerator[bytes]

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


async def _read(store: LocalStore, segments: Sequence[Segment], start: int, end: int) -> AsyncGenerator[bytes]:
    """The bytes [start, end) of the segments in a row."""
    position = 0
    for segment in segments:
        length = _length(segment)
        first, last = max(start - position, 0), min(end - position, length)
        position += length
        if first >= last:
            continue
        if isinstance(segment, bytes):
            yield segment[first:last]
            continue
        file: BinaryIO = await to_thread.run_sync(store.open, segment.key, first)
        try:
            while first < last:
                piece = await to_thread.run_sync(file.read, min(PIECE_BYTES, last - first))
                if not piece:
                    raise OSError(f"{segment.key} ends at {first}; {last} bytes were promised")
                first += len(piece)
                yield piece
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(file.close)


def _check_sizes(store: LocalStore, segments: Sequence[Segment]) -> None:
    """A damaged store must show as an error, not as a download that stops half-way."""
    for segment in segments:
        if isinstance(segment, Stored) and store.size(segment.key) != segment.size:
            raise OSError(f"{segment.key} has not the {segment.size} bytes its manifest says")


def _length(segment: Segment) -> int:
    return len(segment) if isinstance(segment, bytes) else segment.size


def _not_satisfiable(request: Request, size: int) -> Response:
    error = MergeyardError("range_not_satisfiable", f"The range lies outside the {size:,} bytes there are.")
    return problem_response(
        error,
        instance=request.url.path,
        request_id=request.state.request_id,
        headers={"Content-Range": f"bytes */{size}"},
    )
