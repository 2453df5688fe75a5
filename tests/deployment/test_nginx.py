"""Downloads through nginx with X-Accel-Redirect are those of the API, byte for byte and header for header."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import httpx
import pytest

from app.api.transfer import ACCEL, ACCEL_OFFERED
from app.artifacts.manifest import MANIFEST_NAME
from app.errors import CODES
from app.records.audit import Audit
from app.records.job import Job
from app.settings import Settings
from tests.api.serving import PROBLEM, problem
from tests.deployment import nginx
from tests.deployment.conftest import Fronted

WEIGHTS = bytes(range(256)) * 40_000
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "empty.txt": b"", "chat template.jinja": b"{{ x }}"}
SAME = (
    "content-length",
    "content-range",
    "content-type",
    "content-encoding",
    "etag",
    "repr-digest",
    "cache-control",
    "last-modified",
    "x-content-type-options",
    "x-repo-commit",
)
ETAG = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
REQUESTS = [
    {},
    {"range": "bytes=0-0"},
    {"range": "bytes=100-199"},
    {"range": "bytes=5000000-"},
    {"range": "bytes=-7"},
    {"range": "bytes=-999999999"},
    {"range": "bytes=10-99999999999"},
    {"range": "bytes=0-1,5-6"},
    {"range": "lines=1-2"},
    {"range": "bytes=99999999999-"},
    {"range": "bytes=0-9", "if-range": ETAG},
    {"range": "bytes=0-9", "if-range": '"other"'},
    {"range": "bytes=0-9", "if-range": "Wed, 21 Oct 2026 07:28:00 GMT"},
    {"if-none-match": ETAG},
    {"if-none-match": '"other"'},
    {"if-modified-since": "Wed, 21 Oct 2099 07:28:00 GMT"},
    {"accept-encoding": "gzip"},
]


@pytest.fixture(scope="module")
def job(fronted: Fronted) -> Job:
    return fronted.api.published(FILES)


def test_the_configuration_is_what_nginx_accepts(tmp_path: Path) -> None:
    main = nginx.write(tmp_path / "nginx", listen="8080", upstream="127.0.0.1:8000", store=tmp_path)
    assert "warn" not in nginx.check(nginx.binary(), main)


class TestAFile:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("headers", REQUESTS, ids=lambda headers: ",".join(headers.values()) or "whole")
    @pytest.mark.parametrize(
        "route", ["merges/{id}/files/model.safetensors", "merges/{id}/resolve/main/model.safetensors"]
    )
    def test_is_answered_as_by_the_api(
        self, fronted: Fronted, job: Job, route: str, headers: dict[str, str], method: str
    ) -> None:
        path = f"/{route.format(id=job.id)}"
        direct = fronted.api.http.request(method, path, headers=headers)
        passed = httpx.request(method, fronted.url + path, headers=headers)
        assert passed.status_code == direct.status_code
        if direct.status_code < 400:
            assert passed.content == direct.content
            same = {name: direct.headers.get(name) for name in SAME}
            assert {name: passed.headers.get(name) for name in SAME} == same
            assert passed.status_code != 200 or passed.headers["accept-ranges"] == "bytes"
        else:
            assert passed.json()["code"] == direct.json()["code"]
        assert passed.headers["x-request-id"] and ACCEL.lower() not in passed.headers

    @pytest.mark.parametrize("name", FILES)
    def test_of_any_name_comes_whole(self, fronted: Fronted, job: Job, name: str) -> None:
        response = httpx.get(f"{fronted.url}/merges/{job.id}/files/{name}")
        assert (response.status_code, response.content) == (200, FILES[name])
        digest = base64.b64encode(hashlib.sha256(FILES[name]).digest()).decode()
        assert response.headers["repr-digest"] == f"sha-256=:{digest}:"

    def test_is_sent_by_nginx_and_not_by_the_api(self, fronted: Fronted, job: Job) -> None:
        """What the API answers to nginx."""
        path = f"/merges/{job.id}/files/chat%20template.jinja"
        told = fronted.api.http.get(path, headers={ACCEL_OFFERED: ACCEL})
        assert (told.status_code, told.content) == (200, b"")
        assert job.artifact is not None
        key = next(file["key"] for file in job.artifact["files"] if file["name"] == "chat template.jinja")
        assert told.headers[ACCEL] == f"{nginx.LOCATION}{key.replace(' ', '%20')}"

    def test_is_not_handed_over_where_nginx_did_not_ask(self, fronted: Fronted, job: Job) -> None:
        assert fronted.api.http.get(f"/merges/{job.id}/files/model.safetensors").content == WEIGHTS

    def test_cannot_be_had_past_the_api(self, fronted: Fronted, job: Job) -> None:
        assert job.artifact is not None
        for file in job.artifact["files"]:
            response = httpx.get(f"{fronted.url}{nginx.LOCATION}{file['key']}")
            assert response.status_code >= 400 and WEIGHTS[:100] not in response.content

    def test_that_nobody_has_is_not_found(self, fronted: Fronted, job: Job) -> None:
        problem(httpx.get(f"{fronted.url}/merges/{job.id}/files/nowhere"), 404, "not_found")

    def test_that_vanished_from_the_store_is_an_error(self, fronted: Fronted) -> None:
        job = fronted.api.published({"model.safetensors": b"x" * 100})
        assert job.artifact is not None
        fronted.api.store.path(job.artifact["files"][1]["key"]).write_bytes(b"x" * 50)
        problem(httpx.get(f"{fronted.url}/merges/{job.id}/files/model.safetensors"), 500, "internal")

    def test_is_in_the_audit(self, fronted: Fronted, job: Job) -> None:
        httpx.get(f"{fronted.url}/merges/{job.id}/files/config.json", headers={"range": "bytes=0-0"})
        last = Audit(fronted.api.jobs.database).list(action="downloaded")[-1]
        assert (last.action, last.data) == ("downloaded", {"file": "config.json", "range": "bytes=0-0"})


def test_a_store_that_nginx_does_not_see_is_a_problem_with_a_code(fronted: Fronted, job: Job, tmp_path: Path) -> None:
    port, upstream = nginx.free_port(), fronted.api.url.removeprefix("http://")
    main = nginx.write(tmp_path / "nginx", listen=f"127.0.0.1:{port}", upstream=upstream, store=tmp_path / "other")
    with nginx.running(nginx.binary(), main, port) as url:
        not_ready(httpx.get(f"{url}/merges/{job.id}/files/config.json"))


def test_the_tar_is_streamed_by_the_api(fronted: Fronted, job: Job) -> None:
    response = httpx.get(f"{fronted.url}/merges/{job.id}/archive.tar")
    assert response.headers["content-length"] == str(len(response.content))
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        assert [member.name for member in archive] == [MANIFEST_NAME, *FILES]
    part = httpx.get(f"{fronted.url}/merges/{job.id}/archive.tar", headers={"range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, response.content[1000:2000])


def test_an_event_stream_is_not_held_back(fronted: Fronted, job: Job) -> None:
    accept = {"accept": "text/event-stream"}
    with httpx.stream("GET", f"{fronted.url}/merges/{fronted.api.queued().id}/events", headers=accept) as response:
        assert "data:" in next(response.iter_text())


def test_addresses_in_answers_are_those_of_nginx(fronted: Fronted, job: Job) -> None:
    found = httpx.get(f"{fronted.url}/api/models/merges/{job.id}/tree/main", params={"limit": 1})
    assert found.headers["link"].startswith(f"<{fronted.url}/")


def test_a_large_body_meets_the_limit_of_the_api(fronted: Fronted) -> None:
    body = b"x" * (fronted.api.settings.max_body_bytes + 1)
    problem(httpx.post(f"{fronted.url}/merges", content=body), 413, "body_too_large")


def test_an_api_that_is_away_is_a_problem_with_a_code(tmp_path: Path) -> None:
    port, nobody = nginx.free_port(), nginx.free_port()
    main = nginx.write(tmp_path / "nginx", listen=f"127.0.0.1:{port}", upstream=f"127.0.0.1:{nobody}", store=tmp_path)
    with nginx.running(nginx.binary(), main, port) as url:
        not_ready(httpx.get(f"{url}/merges"))


def not_ready(response: httpx.Response) -> None:
    """nginx's own answer is a problem document as the API would write it."""
    code = CODES["not_ready"]
    assert (response.status_code, response.headers["content-type"]) == (code.status, PROBLEM)
    document = json.loads(response.content)
    assert (document["status"], document["code"], document["fault"]) == (code.status, "not_ready", code.fault)
    assert document["title"] == code.title and document["type"] == "urn:mergeyard:problem:not_ready"


@pytest.mark.parametrize("value", ["_artifacts/", "/_artifacts", "/", "http://x/", "/a b/", "//"])
def test_a_location_that_is_none_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(ValueError, match="location of nginx"):
        Settings(accel_redirect=value)
