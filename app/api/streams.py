"""Open event streams: one reader of the database for all of a process's listeners, and what each of them is due.

    database ◀─ one look, twice a second, while anybody listens ─ Streams ─▶ a channel a merge ─▶ its listeners

Everything here but the look itself happens on the event loop, so nothing is locked. What a listener holds is bounded:
MOST_WAITING events, which are the channel's own bytes, and one progress. Whoever falls behind further is cut off, and
goes on with `Last-Event-ID` when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from anyio import CapacityLimiter, to_thread
from fastapi.sse import format_sse_event
from prometheus_client import Gauge

from app.api.schemas import MergeEvent, StreamProgress
from app.errors import MergeyardError
from app.records.following import Following, News, Seen, Standing
from app.records.job import Event, Status

LOOK_SECONDS = 0.5  # a worker writes its progress no oftener
MOST_WAITING = 256  # events for one listener
TERMINAL = frozenset(str(status) for status in Status if status.finished)  # types of the events that end a merge

log = logging.getLogger("mergeyard.api")


class Listener:
    """What one open stream is due, of the events after number ``after``."""

    __slots__ = ("_after", "_ended", "_events", "_overrun", "_progress", "_wake")

    def __init__(self, after: int) -> None:
        self._after = after
        self._events: deque[tuple[int, bytes]] = deque()
        self._progress = b""
        self._wake = asyncio.Event()
        self._ended = False  # nothing comes after what is there
        self._overrun = False  # more came than was taken

    def put(self, number: int, text: bytes) -> None:
        """An event, unless it is known."""
        if number <= self._after or self._overrun:
            return
        self._after = number
        self._events.append((number, text))
        if len(self._events) > MOST_WAITING:
            self._overrun = True
            self._events.clear()
        self._wake.set()

    def put_progress(self, text: bytes) -> None:
        """Progress, in place of any that it has not taken yet."""
        self._progress = text
        self._wake.set()

    def skip_to(self, number: int) -> None:
        """Events up to ``number`` were read some other way."""
        self._after = max(self._after, number)
        self._events = deque(event for event in self._events if event[0] > number)

    def end(self) -> None:
        """After what is there already, nothing comes any more."""
        self._ended = True
        self._wake.set()

    async def take(self, seconds: float) -> tuple[bytes, bool]:
        """Everything that is due, and whether it is the last; waits for at most so long, then it may be empty."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()
        due = self._progress + b"".join(text for _, text in self._events)
        self._progress = b""
        self._events.clear()
        return due, self._ended or self._overrun


class Channel:
    """The listeners of one merge, and what they were told last."""

    def __init__(self, after: int, standing: Standing) -> None:
        self.listeners: set[Listener] = set()
        self.seen = Seen(version=standing.version, event=after)
        self._standing = standing

    def add(self, listener: Listener, standing: Standing) -> None:
        self.listeners.add(listener)
        if standing.version < self._standing.version:
            listener.put_progress(write_progress(self._standing))

    def tell(self, news: News) -> None:
        """Pass on what is new, each text written once for all listeners."""
        before, now = self._standing, news.standing
        if now is not None:
            self._standing = now
            if (before.bytes_done, before.bytes_total) != (now.bytes_done, now.bytes_total):
                text = write_progress(now)
                for listener in self.listeners:
                    listener.put_progress(text)
        for event in news.events:
            text = write_event(event)
            for listener in self.listeners:
                listener.put(event.id, text)
        if now is None or any(event.type in TERMINAL for event in news.events):
            for listener in self.listeners:
                listener.end()
        last = max([self.seen.event, *(event.id for event in news.events)])
        self.seen = Seen(version=self._standing.version, event=last)


class Streams:
    """The streams of one process. ``run`` reads for them until it is cancelled; ``close`` ends them."""

    def __init__(self, following: Following, open_streams: Gauge, *, most: int, most_of_one: int) -> None:
        """``most`` open at once, ``most_of_one`` of them one key's (or address', while there are no keys)."""
        self._following = following
        self._gauge = open_streams
        self._most, self._most_of_one = most, most_of_one
        self._open: Counter[str] = Counter()
        self._channels: dict[str, Channel] = {}
        self._anybody = asyncio.Event()
        self._threads = CapacityLimiter(1)  # of its own: it must not wait behind requests
        self.closing = False

    @contextmanager
    def place(self, who: str) -> Iterator[None]:
        """A stream of ``who`` is open during the block.

        Raises:
            MergeyardError: `too_many_streams` (429), `streams_exhausted` (503), `not_ready` (503) while it closes.
        """
        if self.closing:
            raise MergeyardError("not_ready", "This process is stopping; connect again.")
        if self._open[who] >= self._most_of_one:
            message = f"{self._most_of_one} event streams are open already, and no more at once; close one, or poll."
            raise MergeyardError("too_many_streams", message)
        if self._open.total() >= self._most:
            raise MergeyardError("streams_exhausted", f"All {self._most} event streams are taken; poll meanwhile.")
        self._open[who] += 1
        self._gauge.inc()
        try:
            yield
        finally:
            self._open[who] -= 1
            self._open += Counter()  # those who have none left are not kept
            self._gauge.dec()

    @contextmanager
    def listening(self, job_id: str, listener: Listener, *, read_to: int, standing: Standing) -> Iterator[int]:
        """``listener`` hears of the merge during the block: of every event above the number that this yields.

        ``read_to``: the last event that was read for it, ``standing`` what the row said then. Where more than that was
        passed on to others before, the listener has to read up to that number by itself.
        """
        channel = self._channels.setdefault(job_id, Channel(read_to, standing))
        channel.add(listener, standing)
        if self.closing:
            listener.end()
        self._anybody.set()
        try:
            yield channel.seen.event
        finally:
            channel.listeners.discard(listener)
            if not channel.listeners and self._channels.get(job_id) is channel:
                del self._channels[job_id]

    async def run(self) -> None:
        """Look while anybody listens. A database that is away is waited for."""
        away = False
        while True:
            await self._anybody.wait()
            await asyncio.sleep(LOOK_SECONDS)
            if not self._channels:
                self._anybody.clear()
                continue
            seen = {job_id: channel.seen for job_id, channel in self._channels.items()}
            try:
                found = await to_thread.run_sync(self._following.look, seen, limiter=self._threads)
            except Exception as error:
                if not away:
                    log.warning("event streams stand still: %s", error, exc_info=not isinstance(error, MergeyardError))
                away = True
                continue
            away = False
            for job_id, news in found.items():
                if (channel := self._channels.get(job_id)) is not None and channel.seen == seen[job_id]:
                    channel.tell(news)

    def close(self) -> None:
        """End every stream: the process stops, and its clients go on with another."""
        self.closing = True
        for channel in self._channels.values():
            for listener in channel.listeners:
                listener.end()


def write_event(event: Event) -> bytes:
    """An event as text of a stream: its number is what a client sends as Last-Event-ID."""
    return format_sse_event(event=event.type, data_str=MergeEvent.of(event).model_dump_json(), id=str(event.id))


def write_progress(standing: Standing) -> bytes:
    """Progress has no number: it is not kept, and a client that comes back goes on after the last event."""
    return format_sse_event(event="progress", data_str=StreamProgress.of(standing).model_dump_json())
