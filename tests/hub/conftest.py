"""A hub with keys and its clients: each huggingface_hub in an environment of its own, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.records.audit import Audit
from app.records.database import Database
from app.records.job import Job
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests import servers
from tests.api.serving import ServedApi, serving
from tests.hub.clients import REQUIREMENTS, python_of

CLIENT = Path(__file__).with_name("client.py")


@dataclass(frozen=True)
class Hub:
    """A served API on which alice and bob each have a key."""

    served: ServedApi
    keys: Mapping[str, str]

    def published(self, files: Mapping[str, bytes], owner: str = "alice") -> Job:
        return self.served.published(files, owner=owner)

    def manifest(self, job: Job) -> dict[str, str]:
        """sha256 by name, as the API lists them."""
        return {item["name"]: item["sha256"] for item in self.get(f"/merges/{job.id}/files")["items"]}

    def get(self, path: str) -> Any:
        return self.send("GET", path)

    def point(self, alias: str, job: Job) -> None:
        self.send("PUT", f"/aliases/{alias}", json={"merge": job.id})

    def send(self, method: str, path: str, **options: Any) -> Any:
        answer = self.served.http.request(method, path, headers=self._headers, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def downloads(self, job: Job) -> list[tuple[str, str]]:
        """(file, range) of every request that was sent bytes of the merge."""
        found = Audit(self.served.jobs.database).list(action="downloaded", limit=10_000)
        return [(entry.data["file"], entry.data["range"]) for entry in found if entry.subject == job.id]

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys['alice']}"}


@dataclass(frozen=True)
class Client:
    """Someone with a huggingface_hub, a cache of their own, and a key."""

    python: Path
    version: str
    home: Path
    endpoint: str
    token: str | None

    def run(self, *steps: tuple[str, Mapping[str, Any]]) -> list[Any]:
        """What each step gave, in one process. Nothing but the endpoint was called."""
        done = self.process([CLIENT], json.dumps(steps))
        return list(json.loads(done.stdout))

    def process(self, arguments: list[Path | str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.python, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            env=self.environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "CALLED" not in done.stderr, done.stderr
        return done

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        given = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }
        return {**kept, **given, **({"HF_TOKEN": self.token} if self.token else {})}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Hub]:
    data = tmp_path_factory.mktemp("hub")
    path = data / "records.sqlite3"
    path.write_bytes(sqlite_template.read_bytes())
    with servers.short_folder() as folder, servers.valkey(folder / "valkey.sock") as broker:
        settings = Settings(
            data_dir=data,
            database_url=f"sqlite:///{path}",
            broker_url=broker,
            rate_requests=0,
            rate_failures=0,
            janitor_seconds=3600,
        )
        keys = Keys(database := Database(settings.database))
        made = {
            owner: keys.create(owner=owner, scopes=[Scope.READ, Scope.MERGE], by=Caller(owner="cli:tests")).text
            for owner in ("alice", "bob")
        }
        database.close()
        with serving(settings) as served:
            yield Hub(served, made)


@pytest.fixture(scope="module", params=REQUIREMENTS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def alice(hub: Hub, version: str, tmp_path: Path) -> Client:
    """Alice with an empty cache."""
    return Client(python_of(version), version, tmp_path / "hf", hub.served.url, hub.keys["alice"])
