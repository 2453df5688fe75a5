"""Range and conditional requests, RFC 9110 sections 13 and 14, for representations with a strong ETag."""

from __future__ import annotations

import re

RANGE = re.compile(r"bytes=\s*(\d{1,18})?-(\d{1,18})?\s*", re.ASCII | re.IGNORECASE)


class NotSatisfiableError(Exception):
    """The range lies wholly outside the representation."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open byte range [start, end) a ``Range`` header asks for, or None to send everything.

    None also for what a server may ignore: other units, several ranges, and what does not parse.

    Raises:
        NotSatisfiableError: for ``bytes=SIZE-`` and beyond, and for an empty suffix.
    """
    match = RANGE.fullmatch(header or "")
    if not match or match.group(1, 2) == (None, None):
        return None
    first, last = match.groups()
    if first is None:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), size if last is None else min(size, int(last) + 1)
        if last is not None and int(last) < int(first):
            return None
    if start >= size:
        raise NotSatisfiableError
    return start, end


def if_range_allows(header: str | None, etag: str) -> bool:
    """Whether ``If-Range`` (absent, or a strong comparison with our ETag; dates never match) lets a range through."""
    return header is None or header.strip() == etag


def none_match(header: str | None, etag: str) -> bool:
    """Whether ``If-None-Match`` names our ETag (weak comparison), which makes the answer 304."""
    if header is None:
        return False
    wanted = {part.strip().removeprefix("W/") for part in header.split(",")}
    return "*" in wanted or etag.removeprefix("W/") in wanted
