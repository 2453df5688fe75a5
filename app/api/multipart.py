"""multipart/form-data as it streams: python-multipart's push parser turned into parts that are pulled.

Starlette's own parser spools every file to the system's temporary folder first, which is the wrong disk for 20 GB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import MergeyardError

Happening = tuple[Literal["begin", "data", "end", "over"], bytes]


def boundary_of(content_type: str) -> bytes:
    """The boundary a multipart Content-Type names. Raises `unsupported_media_type`."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        message = "Uploads are multipart/form-data, one part a file (curl: -F files=@config.json -F files=@…)."
        raise MergeyardError("unsupported_media_type", message)
    return boundary


def file_parts(body: Iterator[bytes], boundary: bytes) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Every part as (file name, its bytes). The bytes must be used up before the next part is asked for.

    Raises:
        MergeyardError: `request_invalid` for what is not well-formed, ends early, or has no file name.
    """
    happenings = _happenings(body, boundary)
    for kind, value in happenings:
        if kind == "begin":
            yield _file_name(value), _bytes_of(happenings)
        elif kind == "over":
            return
    raise MergeyardError("request_invalid", "The multipart body ends before its closing boundary; send it again.")


def _bytes_of(happenings: Iterator[Happening]) -> Iterator[bytes]:
    for kind, value in happenings:
        if kind == "end":
            return
        yield value
    raise MergeyardError("request_invalid", "The multipart body ends in the middle of a file; send it again.")


def _happenings(body: Iterator[bytes], boundary: bytes) -> Iterator[Happening]:
    events = _Events()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": events.header_field,
                "on_header_value": events.header_value,
                "on_header_end": events.header_end,
                "on_headers_finished": events.headers_finished,
                "on_part_data": events.part_data,
                "on_part_end": events.part_end,
                "on_end": events.over,
            },
        )
        for piece in body:
            parser.write(piece)
            while events.queue:
                yield events.queue.popleft()
    except FormParserError as error:
        raise MergeyardError("request_invalid", f"The body is not valid multipart/form-data: {error}.") from None


def _file_name(disposition: bytes) -> str:
    _, options = parse_options_header(disposition)
    name = options.get(b"filename")
    if not name:
        field_name = options.get(b"name", b"").decode(errors="replace")[:80]
        message = f"The form field {field_name!r} is not a file; every part of an upload is a file with a name."
        raise MergeyardError("request_invalid", message)
    return name.decode("utf-8", errors="replace")


@dataclass
class _Events:
    """Collects the parser's callbacks of one piece of body."""

    queue: deque[Happening] = field(default_factory=deque)
    name: bytes = b""
    value: bytes = b""
    disposition: bytes = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        if self.name.lower() == b"content-disposition":
            self.disposition = self.value
        self.name = self.value = b""

    def headers_finished(self) -> None:
        self.queue.append(("begin", self.disposition))
        self.disposition = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.queue.append(("data", data[start:end]))

    def part_end(self) -> None:
        self.queue.append(("end", b""))

    def over(self) -> None:
        self.queue.append(("over", b""))
