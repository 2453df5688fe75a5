"""The courier: sends what is due in the outbox. One task in every API process that may send webhooks."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import httpx
from anyio import CapacityLimiter, to_thread

import app
from app.errors import MergeyardError
from app.records.deliveries import Deliveries, Delivery
from app.records.outbox import DeliveryState
from app.webhooks.outbound import Allowed, Refused, post
from app.webhooks.signing import signed_headers

OUTCOMES = ("delivered", "failed", "given_up")  # of an attempt; what failed is tried again
AT_ONCE = 32  # attempts in flight: receivers that hang must not keep others waiting
LOOK_SECONDS = 1.0

log = logging.getLogger("mergeyard.webhooks")


class Courier:
    """Sends the deliveries of a database, signed with ``secrets``, to ``allowed`` hosts.

    ``count`` is told one of ``OUTCOMES`` after each attempt.
    """

    def __init__(
        self, deliveries: Deliveries, allowed: Allowed, secrets: Sequence[bytes], *, count: Callable[[str], None]
    ) -> None:
        self._deliveries, self._allowed, self._secrets, self._count = deliveries, allowed, secrets, count
        self._threads = CapacityLimiter(1)  # of its own: it must not wait behind requests
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send until cancelled. What was in flight then is sent again, under its id, by whoever looks next."""
        try:
            while True:
                try:
                    await self._look()
                except MergeyardError as error:
                    log.warning("webhooks wait: %s", error)
                except Exception:
                    log.exception("webhooks wait")
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for task in self._sending:
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)

    async def _look(self) -> None:
        free = AT_ONCE - len(self._sending)
        if free <= 0:
            return
        for delivery in await to_thread.run_sync(self._deliveries.take, free, limiter=self._threads):
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _deliver(self, delivery: Delivery) -> None:
        status, error = await self._attempt(delivery)
        try:
            after = await to_thread.run_sync(
                lambda: self._deliveries.note(delivery.id, status=status, error=error), limiter=self._threads
            )
        except MergeyardError as failure:
            log.warning(
                "an attempt is not noted, and will be made again: %s", failure, extra={"merge": delivery.job_id}
            )
            return
        given_up = after is not None and after.state is DeliveryState.FAILED
        self._count("delivered" if error is None else "given_up" if given_up else "failed")
        if after is not None and given_up:
            log.warning(
                "webhook %s given up after %d attempts",
                delivery.id,
                len(after.attempts),
                extra={"merge": delivery.job_id, "owner": delivery.owner},
            )

    async def _attempt(self, delivery: Delivery) -> tuple[int | None, str | None]:
        """The answer's status, or why there is none, in words that tell nothing of the network here."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"mergeyard/{app.__version__}",
            **signed_headers(self._secrets, delivery.owner, delivery.id, datetime.now(UTC), delivery.body),
        }
        try:
            target = self._allowed.target(delivery.url)  # what is allowed may have changed since it was submitted
            status = await post(target, delivery.body.encode(), headers)
        except Refused as error:
            return None, f"not sent: {error}"
        except (TimeoutError, httpx.TimeoutException):
            return None, "no answer in time"
        except httpx.ConnectError as error:
            secure = isinstance(error.__context__, ssl.SSLError) or "CERTIFICATE" in str(error).upper()
            return None, "no secure connection: its certificate is not valid" if secure else "no connection"
        except (httpx.HTTPError, OSError, ValueError):
            return None, "the connection broke"
        if 300 <= status < 400:
            return status, "redirects are not followed"
        return status, None if 200 <= status < 300 else f"answered {status}"
