"""A real API behind a real socket, on a real database and broker, and the records behind it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.api.examples import RECIPE
from app.artifacts.manifest import MANIFEST_NAME
from app.artifacts.opening import open_store
from app.artifacts.store import ArtifactStore
from app.records.database import Database
from app.records.job import Job, NewJob
from app.records.jobs import Jobs
from app.settings import Settings
from mergeyard.serve import Server
from tests import files
from tests.records.submitting import wait_a_moment

PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class ServedApi:
    """``http`` talks to the API; ``jobs`` and ``store`` are what its workers would use."""

    http: httpx.Client
    settings: Settings
    jobs: Jobs
    store: ArtifactStore

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    def submit(self, **envelope: Any) -> dict[str, Any]:
        """A merge of the example recipe."""
        response = self.http.post("/merges", json={"recipe": RECIPE, **envelope})
        assert response.status_code == 202, response.text
        return response.json()

    def queued(self, **changes: Any) -> Job:
        """A job in the records alone."""
        wait_a_moment(self.jobs.database)  # after the job before it
        job, _ = self.jobs.submit(self.new(**changes))
        return job

    def new(self, **changes: Any) -> NewJob:
        """What a submission of a job would bring."""
        new = NewJob(
            recipe={}, resolved={}, method="ties", plan_digest="0" * 64, estimates={}, total_bytes=100, owner="local"
        )
        return replace_fields(new, changes)

    def running(self, **changes: Any) -> Job:
        job = self.jobs.claim(self.queued(**changes).id, lease_seconds=3600)
        assert job is not None
        return job

    def published(self, contents: Mapping[str, bytes], **changes: Any) -> Job:
        """A succeeded merge with these files, and a manifest that names them."""
        job = self.running(**changes)
        stored = [self.store_file(job, name, data) for name, data in contents.items()]
        listed = [{key: value for key, value in file.items() if key != "key"} for file in stored]
        manifest = self.store_file(job, MANIFEST_NAME, json.dumps({"files": listed}).encode())
        every = [manifest, *stored]
        return self.jobs.publish(
            job.id,
            job.lease_token or "",
            {
                "manifest_sha256": manifest["sha256"],
                "manifest_key": manifest["key"],
                "size": sum(file["size"] for file in every),
                "files": every,
            },
        )

    def store_file(self, job: Job, name: str, data: bytes) -> dict[str, Any]:
        """A file of the job's attempt, as ``Job.artifact`` has it."""
        key = f"{job.id}/{job.lease_token}/{name}"
        with self.store.create(key, len(data)) as writer:
            writer.write(data)
        return {"name": name, "key": key, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class GuardedApi:
    """An API with keys: ``keys`` by the names that the ``guarded`` fixture gives their holders."""

    served: ServedApi
    keys: Mapping[str, str]

    def send(self, caller: str, method: str, path: str, **options: Any) -> httpx.Response:
        """A request with the caller's key."""
        headers = {**options.pop("headers", {}), **self.header(caller)}
        return self.served.http.request(method, path, headers=headers, **options)

    def header(self, caller: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[caller]}"} if self.keys[caller] else {}


def replace_fields(new: NewJob, changes: Mapping[str, Any]) -> NewJob:
    from dataclasses import replace

    return replace(new, **changes)


def write_sources(root: Path) -> Path:
    """A model root in which the documented example recipe means something."""
    files.write_model(root / "smollm2-135m-instruct")
    files.write_adapter(root / "adapters" / "sql")
    files.write_adapter(root / "adapters" / "json", files.lora_tensors(seed=2))
    (root / "tasks").mkdir()
    (root / "tasks" / "sql.jsonl").write_text(
        '{"prompt": "How many rows has t?", "answer": " SELECT COUNT(*) FROM t"}\n'
    )
    return root


@contextmanager
def serving(settings: Settings) -> Iterator[ServedApi]:
    """``mergeyard api`` in a thread, on a free port."""
    server = Server(settings.model_copy(update={"port": 0}))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the API does not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    database = Database(settings.database)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield ServedApi(http, settings, Jobs(database), open_store(settings))
    finally:
        database.close()
        server.should_exit = True
        thread.join(timeout=20)


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a response, after checking that it is one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    document = response.json()
    assert document["code"] == code, document
    assert document["status"] == status
    assert document["type"] == f"urn:mergeyard:problem:{code}"
    assert document["fault"] in ("user", "system")
    assert document["problems"][0]["code"] == code
    assert document["request_id"] == response.headers["x-request-id"]
    return document
