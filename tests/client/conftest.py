"""Both clients, used alike: what one does the other must do."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from app.settings import Settings
from mergeyard import AsyncClient, Client
from tests import servers
from tests.api.serving import ServedApi, serving, write_sources

Handler = Callable[[httpx.Request], httpx.Response]
Connect = Callable[..., Any]


class Awaited:
    """An AsyncClient whose methods are awaited in an event loop of another thread."""

    def __init__(self, portal: BlockingPortal, client: AsyncClient) -> None:
        self._portal, self._client = portal, client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if inspect.iscoroutinefunction(method):
            return lambda *given, **named: self._portal.call(partial(method, *given, **named))
        return lambda *given, **named: self._each(method(*given, **named))

    def _each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        nothing = object()
        while (item := self._portal.call(anext, items, nothing)) is not nothing:
            yield item


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A client of each kind, of a service that is a function (``Handler``) or an address."""
    if request.param == "sync":
        yield lambda service, **options: Client(**_given(service, options))
        return
    with start_blocking_portal() as portal:
        yield lambda service, **options: Awaited(portal, AsyncClient(**_given(service, options)))


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str) -> Iterator[ServedApi]:
    """A real API with models, and no workers."""
    with servers.short_folder() as folder, servers.valkey(folder / "valkey.sock") as broker:
        settings = Settings(
            data_dir=tmp_path / "data",
            database_url=sqlite_url,
            broker_url=broker,
            model_roots=str(write_sources(tmp_path / "models")),
            threads=1,
        )
        with serving(settings) as served:
            yield served


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits; what the client would have waited is kept, without the dice."""
    made: list[float] = []

    async def note(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr("time.sleep", made.append)
    monkeypatch.setattr("anyio.sleep", note)
    monkeypatch.setattr("mergeyard.calls.random.uniform", lambda _low, high: high)
    monkeypatch.setattr("mergeyard.download.pause_before", lambda _: 0.0)
    return made


def _given(service: Handler | str, options: dict[str, Any]) -> dict[str, Any]:
    if isinstance(service, str):
        return {"url": service, **options}
    return {"url": "http://service", "transport": httpx.MockTransport(service), **options}
