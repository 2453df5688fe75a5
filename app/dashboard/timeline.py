"""What became of a merge, attempt by attempt and stage by stage, with their times: read off its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from app.records.job import Event, Job, Stage, Status
from app.records.transitions import LOST

WAITING = "waiting"  # for a worker
REUSED = "reused"  # what takes the place of an attempt
# The events that end an attempt, and how each ends it.
ENDINGS = {
    "succeeded": "succeeded",
    "failed": "failed",
    "retried": "failed",
    "worker_lost": "lost",
    "handed_back": "handed back",
    "cancelled": "cancelled",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a merge was ``name``: ``waiting``, or in a stage. ``ended`` None: it still is."""

    name: str
    began: datetime
    ended: datetime | None

    def seconds(self, now: datetime) -> float:
        return max(0.0, ((self.ended or now) - self.began).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """From a claim to what ended it (``ending``; empty: it goes on). ``code`` and ``message``: why it failed."""

    number: int
    worker: str
    spans: tuple[Span, ...]
    ending: str
    code: str
    message: str

    @property
    def began(self) -> datetime:
        return self.spans[0].began

    @property
    def ended(self) -> datetime | None:
        return self.spans[-1].ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Every time since the merge was submitted, without gaps, and its attempts, which have the stages among them."""

    spans: tuple[Span, ...]
    attempts: tuple[Attempt, ...]

    def stage_seconds(self, now: datetime) -> dict[str, float]:
        """How long the merge was in each stage in all, and waited, in the order of a merge."""
        order = (WAITING, *Stage)
        total = dict.fromkeys(order, 0.0)
        for span in self.spans:
            total[span.name] = total.get(span.name, 0.0) + span.seconds(now)
        return {name: seconds for name, seconds in total.items() if any(span.name == name for span in self.spans)}


def timeline(events: Sequence[Event]) -> Timeline:
    """``events``: the merge's, in order, those of its files left out or not."""
    reading = _Reading()
    for event in events:
        reading.take(event)
    return reading.result()


def merged_since(job: Job, found: Timeline) -> datetime | None:
    """When the attempt that goes on began to merge: what its bytes a second are counted from."""
    if job.status is not Status.RUNNING or not found.attempts:
        return None
    return next((span.began for span in found.attempts[-1].spans if span.name == Stage.MERGING), None)


@dataclass(slots=True)
class _Reading:
    """What was read so far. One span is open until the merge has ended; an attempt is, between claim and ending."""

    spans: list[Span] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    open: tuple[str, datetime] | None = None
    claim: tuple[dict[str, Any], int] | None = None  # the event's data, and how many spans were there before

    def take(self, event: Event) -> None:
        match event.type:
            case "submitted":
                self.open = (WAITING, event.at)
            case "claimed":
                self._turn(Stage.RESOLVING, event.at)
                self.claim = (dict(event.data), len(self.spans))
            case "stage":
                self._turn(str(event.data["stage"]), event.at)
            case ending if ending in ENDINGS:
                self._end(event)

    def result(self) -> Timeline:
        spans = [*self.spans]
        if self.open is not None:
            spans.append(Span(*self.open, None))
        attempts = [*self.attempts]
        if self.claim is not None:
            attempts.append(_attempt(self.claim[0], spans[self.claim[1] :], "", {}))
        return Timeline(spans=tuple(spans), attempts=tuple(attempts))

    def _turn(self, name: str, at: datetime) -> None:
        self._close(at)
        self.open = (name, at)

    def _close(self, at: datetime) -> None:
        if self.open is not None:
            self.spans.append(Span(*self.open, at))
            self.open = None

    def _end(self, event: Event) -> None:
        """An attempt's end, the merge's, or both: after the last attempt's `worker_lost` comes `failed`."""
        self._close(event.at)
        if self.claim is not None:
            data, before = self.claim
            self.attempts.append(_attempt(data, self.spans[before:], event.type, event.data))
            self.claim = None
        if event.type in ("retried", "worker_lost", "handed_back"):
            self.open = (WAITING, event.at)
        elif self.spans and self.spans[-1].seconds(event.at) == 0 and self.spans[-1].name == WAITING:
            self.spans.pop()  # it did not wait: the next event ended it


def _attempt(claim: dict[str, Any], spans: Sequence[Span], ending: str, data: Any) -> Attempt:
    error = data.get("error") or {}
    lost = ending == "worker_lost"
    return Attempt(
        number=int(claim["attempt"]),
        worker=str(claim.get("worker") or ""),
        spans=tuple(spans),
        ending=ENDINGS.get(ending, ""),
        code="worker_lost" if lost else str(error.get("code", "")),
        message=LOST.get(str(data.get("reason")), "") if lost else str(error.get("message", "")),
    )
