"""The API behind the nginx that is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.settings import Settings
from tests import servers
from tests.api.serving import ServedApi, serving, write_sources
from tests.deployment import nginx


@dataclass(frozen=True)
class Fronted:
    """An API, and the URL of the nginx before it, whose files are in ``folder``."""

    api: ServedApi
    url: str
    folder: Path


@pytest.fixture(scope="session")
def fronted(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Fronted]:
    program = nginx.binary()
    data = tmp_path_factory.mktemp("fronted")
    (data / "records.sqlite3").write_bytes(sqlite_template.read_bytes())
    with servers.short_folder() as short, servers.valkey(short / "valkey.sock") as broker:
        settings = Settings(
            data_dir=data,
            database_url=f"sqlite:///{data}/records.sqlite3",
            broker_url=broker,
            model_roots=str(write_sources(data / "models")),
            accel_redirect=nginx.LOCATION,
            janitor_seconds=3600,
        )
        with serving(settings) as api:
            port = nginx.free_port()
            main = nginx.write(
                data / "nginx",
                listen=f"127.0.0.1:{port}",
                upstream=api.url.removeprefix("http://"),
                store=settings.artifacts,
            )
            with nginx.running(program, main, port) as url:
                yield Fronted(api, url, data / "nginx")
