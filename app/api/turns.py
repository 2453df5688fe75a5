"""Turns: work that takes long has threads of its own, and waits for one of them only so long.

A thread that a slow plan holds, or that waits for one, must not be one of those that answer everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, Semaphore, fail_after, to_thread

from app.errors import MergeyardError

Result = TypeVar("Result")


class Turns:
    """At most ``at_once`` pieces of work at the same time; the others wait in the event loop, ``wait_seconds`` each."""

    def __init__(self, at_once: int, wait_seconds: float) -> None:
        self._wait_seconds = wait_seconds
        self._free = Semaphore(at_once)
        self._threads = CapacityLimiter(at_once)  # never waited for: whoever has a turn has a thread

    async def take(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives, done in a thread. Raises `busy` where there is no turn in time."""
        try:
            with fail_after(self._wait_seconds):
                await self._free.acquire()
        except TimeoutError:
            message = "As many recipes are being planned as the service can plan at once; send it again shortly."
            raise MergeyardError("busy", message) from None
        try:
            return await to_thread.run_sync(work, limiter=self._threads)
        finally:
            self._free.release()
