"""Event streams as the service sends them (server-sent events): lines in, messages out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Message:
    """One message: its type, and its data as JSON has it."""

    event: str
    data: Any


class MessageReader:
    """Lines in, messages out. One that is cut off is no message; comments and what has no data are passed over."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def read(self, line: str) -> Message | None:
        """The message that this line ends, if it does."""
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        return Message(event=fields.get("event", "message"), data=json.loads(fields["data"]))
