"""Event streams as the service sends them (server-sent events): lines in, messages out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Message:
    """One message: its type, and its data as JSON has it."""

    event: str
    data: Any


def read_messages(lines: Iterable[str]) -> Iterator[Message]:
    """The messages of a stream. One that is cut off is no message; comments and what has no data are passed over."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            yield Message(event=fields.get("event", "message"), data=json.loads(fields["data"]))
        fields = {}
