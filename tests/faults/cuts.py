"""Load over connections to broker and database that are cut, delayed, half-closed and swallowed at random."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import make_url

from tests.faults.audit import Audit, audit
from tests.faults.load import Load
from tests.faults.proxy import Address, Proxy, proxied
from tests.faults.service import running

FAULTS: Mapping[str, float] = {"none": 1, "cut": 4, "delay": 2, "half-close": 2, "swallow": 1}
DRAIN_SECONDS = 120.0
PATIENCE = 4  # times the seconds asked for: how many connections there are to break is up to the load


def break_by_cuts(
    folder: Path,
    models: Path,
    database_url: str,
    expected: Mapping[str, Mapping[str, str]],
    seconds: float,
    seed: int,
) -> tuple[Proxy, Proxy, Load, Audit]:
    """The broker's proxy, the database's, the load, and the audit when all is calm again.

    The load goes on for ``seconds``, and longer where fewer connections broke than ``enough`` asks for.
    """
    folder.mkdir()
    socket_path, rng = folder / "real.sock", random.Random(seed)
    with ExitStack() as stack:
        broker = stack.enter_context(proxied(Proxy(folder / "cut.sock", socket_path, random.Random(seed + 2), FAULTS)))
        where = Proxy(("127.0.0.1", 0), server_address(database_url), random.Random(seed + 3), FAULTS)
        database = stack.enter_context(proxied(where))
        service = stack.enter_context(
            running(
                folder / "service",
                models,
                database_url,
                via_database=through(database_url, database.port),
                via_broker=f"redis+socket://{folder / 'cut.sock'}",
                socket_path=socket_path,
            )
        )
        load = Load(service.url, expected, random.Random(seed + 1))
        load.start()
        began = time.monotonic()
        while not load.wrong and _goes_on(time.monotonic() - began, seconds, broker, database):
            time.sleep(rng.uniform(0.2, 1.5))
            rng.choice((broker, database)).break_all(rng.choice(("cut", "cut", "delay", "half-close")))
        for proxy in (broker, database):
            proxy.recover()
        load.drain(DRAIN_SECONDS)
        found = audit(service.settings, load.accepted, load.deleted)
    found.lost += sorted(load.open)
    return broker, database, load, found


def enough(proxies: Iterable[Proxy], seconds: float) -> bool:
    """Whether each proxy gave a fault for every two seconds."""
    return all(sum(proxy.faults.values()) > seconds / 2 for proxy in proxies)


def _goes_on(passed: float, seconds: float, *proxies: Proxy) -> bool:
    return passed < seconds or (passed < PATIENCE * seconds and not enough(proxies, seconds))


def server_address(url: str) -> Address:
    """Where the PostgreSQL server of the URL listens."""
    parts = make_url(url)
    host = parts.query.get("host") or parts.host or "127.0.0.1"
    assert isinstance(host, str)
    port = parts.port or 5432
    return Path(host) / f".s.PGSQL.{port}" if host.startswith("/") else (host, port)


def through(url: str, port: int) -> str:
    """The same database by way of a proxy on this machine."""
    parts = make_url(url)
    query = {name: value for name, value in parts.query.items() if name != "host"}
    return parts.set(host="127.0.0.1", port=port, query=query).render_as_string(hide_password=False)
