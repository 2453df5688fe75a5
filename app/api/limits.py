"""Rate limits: what a key may send in a minute, counted in the broker, so that all API processes count together.

A window slides: what was sent in the minute before counts less and less, so nobody saves up for a burst at its edge.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

from app.settings import Settings

WINDOW_SECONDS = 60
PAUSE_SECONDS = 5.0  # a broker that does not answer is not asked again for this long
ANSWER_SECONDS = 0.5
CERTIFICATE = re.compile(r"([?&]ssl_cert_reqs=)CERT_(REQUIRED|OPTIONAL|NONE)\b")

log = logging.getLogger("mergeyard.api")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What is left after a request: ``headers`` say so, ``retry_after`` (seconds) is set where it was too much."""

    headers: Mapping[str, str]
    retry_after: int | None = None


NO_LIMIT = Quota(headers={})


class RateLimits:
    """Counts requests at the broker. Where it does not answer, requests pass: a limit is worth less than the service.

    Safe to share between threads.
    """

    def __init__(self, settings: Settings) -> None:
        amounts = {
            "requests": settings.rate_requests,
            "writes": settings.rate_writes,
            "failures": settings.rate_failures,
        }
        self._policies = {name: RateLimitItemPerMinute(amount) for name, amount in amounts.items() if amount}
        url = _redis_url(settings.broker)
        pool = ConnectionPool.from_url(
            url,
            socket_connect_timeout=ANSWER_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        storage = RedisStorage(url, pool, key_prefix="mergeyard-limits", wrap_exceptions=True)
        self._pool = pool
        self._window = SlidingWindowCounterRateLimiter(storage)
        self._asked_again = 0.0

    def of_key(self, key_id: str, *, writes: bool) -> Quota:
        """Count a request with a key; one that ``writes`` (any but GET, HEAD) counts twice over."""
        return self._take(key_id, ("requests", "writes") if writes else ("requests",))

    def of_failure(self, address: str | None) -> Quota:
        """Count a request from ``address`` whose key is no good. Good keys from there are not held up by it."""
        return self._take(network(address), ("failures",))

    def close(self) -> None:
        self._pool.disconnect()

    def _take(self, who: str, names: Sequence[str]) -> Quota:
        policies = {name: self._policies[name] for name in names if name in self._policies}
        if not policies or time.monotonic() < self._asked_again:
            return NO_LIMIT
        try:
            refused = next((name for name, item in policies.items() if not self._window.hit(item, name, who)), None)
            found = {name: self._window.get_window_stats(item, name, who) for name, item in policies.items()}
        except StorageError as error:
            self._asked_again = time.monotonic() + PAUSE_SECONDS
            log.warning("requests are not counted, the broker does not answer: %s", error)
            return NO_LIMIT
        now = time.time()
        waits = {name: max(1, math.ceil(stats.reset_time - now)) for name, stats in found.items()}
        # draft-ietf-httpapi-ratelimit-headers-10: q quota, w window, r remaining, t seconds until there is more.
        quotas = ", ".join(f'"{name}";q={item.amount};w={WINDOW_SECONDS}' for name, item in policies.items())
        rest = ", ".join(f'"{name}";r={found[name].remaining};t={waits[name]}' for name in policies)
        return Quota(
            headers={"RateLimit-Policy": quotas, "RateLimit": rest},
            retry_after=None if refused is None else waits[refused],
        )


def _redis_url(broker: str) -> str:
    """The broker's URL as redis-py spells it; kombu has words of its own for Unix sockets and certificates."""
    if broker.startswith("redis+socket://"):
        return "unix://" + broker.removeprefix("redis+socket://").replace("virtual_host=", "db=")
    return CERTIFICATE.sub(lambda found: found[1] + found[2].lower(), broker)


def network(address: str | None) -> str:
    """Whom an address stands for: of IPv6, the /64 that one subscriber has."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return address or "unknown"
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)
