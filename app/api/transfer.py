"""Bytes on their way out: a representation made of pieces of stored files, served whole or in part."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote

from anyio import CancelScope, to_thread
from anyio.lowlevel import checkpoint
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.errors import problem_response
from app.api.ranges import NotSatisfiableError, if_range_allows, none_match, parse_range
from app.artifacts.store import ArtifactStore, Opened
from app.errors import MergeyardError

# In MB, not in Starlette's 64 kB, which is a fourth of the throughput.
PIECE_BYTES = 4 << 20
# ASGI's Zero Copy Send: the kernel sends a file's bytes. Read and written by Python, at best half of nginx's throughput
# on loopback; mergeyard/zerocopy.py has it, and where a server has it not the bytes are read.
ZERO_COPY = "http.response.zerocopysend"


@dataclass(frozen=True, slots=True)
class Stored:
    """All of a stored file."""

    key: str
    size: int


Segment = bytes | Stored

# What nginx is told, and what it says where it waits for that. A request that did not come through nginx lacks the
# second, and gets the bytes: whoever asks the API itself must not take an empty answer for a file.
ACCEL = "X-Accel-Redirect"
ACCEL_OFFERED = "X-Sendfile-Type"


async def serve(
    request: Request,
    segments: Sequence[Segment],
    store: ArtifactStore,
    *,
    etag: str,
    headers: Mapping[str, str],
    accel: str = "",
    redirects: bool = False,
) -> Response:
    """Answer GET or HEAD with the segments in a row: 200, 206, 304 or 416.

    ``etag`` is strong and quoted. HEAD ignores Range, as RFC 9110 14.2 wants. ``accel`` is the location under which an
    nginx in front has the store: it sends what is one stored file, and looks at the same Range and If-Range again.
    ``redirects``: to the store itself for one stored file, where it has addresses; who follows asks for the same Range.
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
    if accel and request.headers.get(ACCEL_OFFERED) == ACCEL and (file := _alone(segments)):
        await to_thread.run_sync(_check, store, file)
        del common["Accept-Ranges"]  # nginx adds its own to it
        return HandedOver(headers={**common, ACCEL: accel + quote(file.key)})
    if redirects and (file := _alone(segments)) and if_range_allows(request.headers.get("if-range"), etag):
        await to_thread.run_sync(_check, store, file)
        if url := await to_thread.run_sync(store.signed_url, file.key):
            return HandedOver(status_code=307, headers={"Location": url, "Cache-Control": "no-store"})
    start, end = wanted or (0, size)
    status, extra = 200, {"Content-Length": str(end - start)}
    if wanted:
        status, extra["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
    opened = await to_thread.run_sync(_open_all, store, _between(segments, start, end))
    return Transfer(opened, status_code=status, headers={**common, **extra})


@dataclass(frozen=True, slots=True)
class _Opened:
    """``left`` bytes of an open file, from ``start`` on, where it stands."""

    key: str
    file: Opened
    start: int
    left: int


class HandedOver(Response):
    """No bytes, but where nginx, or whoever asks, finds them."""


class Transfer(StreamingResponse):
    """Streams what is open, and closes it however that ends.

    Also where it never begins: a reader that goes away must not leave a file open.
    """

    body_iterator: AsyncGenerator[bytes]

    def __init__(self, parts: Sequence[bytes | _Opened], *, status_code: int, headers: Mapping[str, str]) -> None:
        super().__init__(_read(parts), status_code=status_code, headers=headers)
        self._parts = parts
        self._zero_copy = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._zero_copy = ZERO_COPY in scope.get("extensions", {})
        try:
            async with aclosing(self.body_iterator):
                await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(self.close)

    async def stream_response(self, send: Send) -> None:
        if not self._zero_copy:
            await super().stream_response(send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self._parts:
            if isinstance(part, _Opened) and part.file.local is not None:
                await _let_send(part, part.file.local, send)
                continue
            async for piece in _read([part]):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def close(self) -> None:
        """Close what is still open; for whoever does not send it after all."""
        _close_all(self._parts)


async def _let_send(part: _Opened, file: BinaryIO, send: Send) -> None:
    descriptor, at = file.fileno(), part.start
    end = at + part.left
    while at < end:
        count = min(PIECE_BYTES, end - at)
        if _cached(descriptor, at, count):
            await checkpoint()  # a fast reader never makes the server wait, and others want their turn
        else:  # the server's own thread must not wait for the disk
            await to_thread.run_sync(os.pread, descriptor, count, at)
        await send({"type": ZERO_COPY, "file": file, "offset": at, "count": count, "more_body": True})
        at += count
    with CancelScope(shield=True):
        await to_thread.run_sync(part.file.close)


def _cached(descriptor: int, at: int, count: int) -> bool:
    """Whether the page cache has the first and the last of these bytes (preadv2(2), RWF_NOWAIT).

    False, too, where the file system cannot tell.
    """
    byte = bytearray(1)
    try:
        for place in (at, at + count - 1):
            os.preadv(descriptor, [byte], place, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise
    return True


async def _read(parts: Sequence[bytes | _Opened]) -> AsyncGenerator[bytes]:
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        left = part.left
        while left:
            piece = await to_thread.run_sync(part.file.read, min(PIECE_BYTES, left))
            if not piece:
                raise OSError(f"{part.key} ends {left} bytes before what was promised")
            left -= len(piece)
            yield piece
        with CancelScope(shield=True):
            await to_thread.run_sync(part.file.close)


def _alone(segments: Sequence[Segment]) -> Stored | None:
    """The stored file that is all there is to send."""
    only = segments[0] if len(segments) == 1 else None
    return only if isinstance(only, Stored) else None


def _check(store: ArtifactStore, file: Stored) -> None:
    """Raises OSError where the file is not there as its manifest says."""
    if store.size(file.key) != file.size:
        raise OSError(f"{file.key} has not the {file.size} bytes its manifest says")


def _between(segments: Sequence[Segment], start: int, end: int) -> list[tuple[Segment, int, int]]:
    """The segments that the bytes [start, end) lie in, each with the range of its own bytes that is wanted."""
    wanted, position = [], 0
    for segment in segments:
        length = _length(segment)
        first, last = max(start - position, 0), min(end - position, length)
        position += length
        if first < last:
            wanted.append((segment, first, last))
    return wanted


def _open_all(store: ArtifactStore, wanted: Sequence[tuple[Segment, int, int]]) -> list[bytes | _Opened]:
    """Every file at once, before the first byte goes out: what is open outlives the deletion of its merge.

    A damaged store must show as an error, not as a download that stops half-way. Raises OSError.
    """
    parts: list[bytes | _Opened] = []
    try:
        for segment, first, last in wanted:
            if isinstance(segment, bytes):
                parts.append(segment[first:last])
                continue
            file = store.open(segment.key, first)
            parts.append(_Opened(segment.key, file, first, last - first))
            if file.size != segment.size:
                raise OSError(f"{segment.key} has not the {segment.size} bytes its manifest says")
    except (OSError, MergeyardError):
        _close_all(parts)
        raise
    return parts


def _close_all(parts: Sequence[bytes | _Opened]) -> None:
    for part in parts:
        if isinstance(part, _Opened):
            part.file.close()


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
