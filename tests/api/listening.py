"""A listener to an event stream, over a real connection."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

ACCEPT = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Told:
    """One message of a stream; ``id`` is None where it has none. Comments are of type ``:``."""

    type: str
    id: int | None
    data: Any


class Stream:
    """The messages of an open stream, one after another."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Told]:
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                yield Told(":", None, line[1:].strip())
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                number = int(fields["id"]) if "id" in fields else None
                yield Told(fields["event"], number, json.loads(fields["data"]))
                fields = {}
            else:
                fields = {}

    def until(self, kind: str) -> list[Told]:
        """The messages up to the first of a type."""
        found = []
        for message in self:
            found.append(message)
            if message.type == kind:
                return found
        raise AssertionError(f"it ended with {found}")


@contextmanager
def listening(
    http: httpx.Client, merge: str, headers: Mapping[str, str] | None = None, **params: Any
) -> Iterator[Stream]:
    path = f"/merges/{merge}/events"
    with http.stream("GET", path, headers={**ACCEPT, **(headers or {})}, params=params) as response:
        assert response.status_code == 200, response.read()
        yield Stream(response)
