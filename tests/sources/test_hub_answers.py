"""What a hub may answer besides files: refusals, nonsense, redirects to where nobody should be sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.errors import MergeyardError
from app.sources.hub.hub import Hub, HubSettings

COMMIT = "a" * 40
DIGEST = "b" * 64


class Answers(ThreadingHTTPServer):
    """A hub that answers everything with the same (status, headers, body), and notes what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def describe(self, *siblings: dict[str, Any], commit: str = COMMIT) -> None:
        document = {"id": "org/model", "sha": commit, "siblings": list(siblings)}
        self.answer = (200, {}, json.dumps(document).encode())


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("authorization")))
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setattr("app.sources.hub.wire.PAUSE_SECONDS", 0.0)
    with Answers() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(answers: Answers, tmp_path: Path) -> Iterator[Hub]:
    made = Hub(settings_of(answers.url, tmp_path))
    yield made
    made.close()


def settings_of(url: str, folder: Path) -> HubSettings:
    return HubSettings(
        endpoint=url, token="hf_secret", repositories=("org/*",), cache=folder, most_bytes=10**9, keep_free=0
    )


def refusal(hub: Hub, name: str = "org/model") -> MergeyardError:
    with pytest.raises(MergeyardError) as raised:
        hub.files(name)
    assert "hf_secret" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "hub_forbidden"),
        (403, {"X-Error-Code": "GatedRepo"}, "hub_forbidden"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "hub_forbidden"),
        (401, {}, "hub_forbidden"),
        (403, {}, "hub_forbidden"),
        (404, {"X-Error-Code": "RepoNotFound"}, "source_not_found"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "source_not_found"),
        (404, {}, "hub_unavailable"),  # no hub says it like this
        (429, {"Retry-After": "300"}, "hub_unavailable"),
        (500, {}, "hub_unavailable"),
        (418, {}, "hub_unavailable"),
    ],
)
def test_refusals_have_a_code(hub: Hub, answers: Answers, status: int, headers: dict[str, str], code: str) -> None:
    answers.answer = (status, headers, b"")
    assert refusal(hub).code == code


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"id": "x", "sha": "../../etc", "siblings": []}', b"[" * 100_000]
)
def test_nonsense_is_no_repository(hub: Hub, answers: Answers, body: bytes) -> None:
    answers.answer = (200, {}, body)
    assert refusal(hub).code == "hub_unavailable"


def test_a_commit_that_was_asked_for_is_the_one_that_is_answered(hub: Hub, answers: Answers) -> None:
    answers.describe(commit="c" * 40)
    assert refusal(hub, f"org/model@{COMMIT}").code == "hub_unavailable"


@pytest.mark.parametrize(
    "told",
    [
        {"rfilename": "config.json", "size": None, "blobId": "d" * 40},
        {"rfilename": "config.json", "size": -1, "blobId": "d" * 40},
        {"rfilename": "config.json", "size": 2, "blobId": "../../../x"},
        {"rfilename": "config.json", "size": 2},
    ],
)
def test_a_file_needs_a_size_and_a_digest(hub: Hub, answers: Answers, told: dict[str, Any]) -> None:
    answers.describe(told)
    assert refusal(hub).code == "source_format"


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/config.json", "config.json\x00", "modeling.py"])
def test_names_that_lead_elsewhere_and_code_are_passed_over(hub: Hub, answers: Answers, name: str) -> None:
    answers.describe({"rfilename": name, "size": 2, "blobId": "d" * 40})
    assert not hub.files("org/model").paths


def test_a_small_file_is_known_by_the_id_that_git_gives_it(hub: Hub, answers: Answers, tmp_path: Path) -> None:
    """sha1 of `blob 2\\0{}`."""
    git = "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    answers.describe({"rfilename": "config.json", "size": 2, "blobId": git})
    commit, _ = hub._listing("org/model", "main")
    answers.answer = (200, {}, b"{}")
    assert hub.files(f"org/model@{commit}").paths["config.json"].read_bytes() == b"{}"
    (tmp_path / "files" / git).unlink()
    answers.answer = (200, {}, b"[]")
    assert refusal(hub, f"org/model@{commit}").code == "digest_mismatch"


def test_more_than_was_announced_is_not_read(hub: Hub, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.sources.hub.wire.MAX_INFO_BYTES", 1000)
    answers.answer = (200, {}, b'{"id": "org/model", "sha": "' + COMMIT.encode() + b'", "x": "' + b"x" * 5000 + b'"}')
    assert refusal(hub).code == "hub_unavailable"


@pytest.mark.parametrize(
    "target", ["https://localhost:9/x", "https://127.0.0.1/x", "https://[::1]/x", "https://10.0.0.1/"]
)
def test_a_redirect_to_a_private_network_is_not_followed(hub: Hub, answers: Answers, target: str) -> None:
    answers.answer = (302, {"Location": target}, b"")
    assert refusal(hub).code == "hub_not_allowed"


def test_a_redirect_in_clear_is_not_followed(hub: Hub, answers: Answers) -> None:
    with Answers() as other:
        answers.answer = (302, {"Location": f"{other.url}/x"}, b"")
        assert refusal(hub).code == "hub_not_allowed"
        assert other.asked == []


def test_nor_is_one_in_clear_to_a_public_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is on the way could read and change what it sends, so its address does not help. No network here."""
    sent: list[str] = []

    def handle(_: object, request: httpx2.Request) -> httpx2.Response:
        sent.append(request.url.host)
        if request.url.host == "127.0.0.1":
            return httpx2.Response(302, headers={"Location": "http://cdn.example.com/x"})
        return httpx2.Response(200, stream=httpx2.ByteStream(b"{}"))

    monkeypatch.setattr("httpx2.HTTPTransport.handle_request", handle)
    public = [(2, 1, 6, "", ("93.184.215.14", 80))]
    monkeypatch.setattr("app.sources.hub.wire.socket.getaddrinfo", lambda *_, **__: public)
    error = refusal(hub)
    assert error.code == "hub_not_allowed" and "cdn.example.com:80" in error.message
    assert sent == ["127.0.0.1"]


def test_the_token_goes_to_the_endpoint_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was looked at is the one that is connected to, under the name that it has. No network here."""
    sent: list[tuple[str, str | None, str | None]] = []

    def handle(_: object, request: httpx2.Request) -> httpx2.Response:
        sent.append((request.url.host, request.headers.get("authorization"), request.extensions.get("sni_hostname")))
        if request.url.host == "127.0.0.1":
            return httpx2.Response(302, headers={"Location": "https://cdn.example.com/x"})
        return httpx2.Response(200, stream=httpx2.ByteStream(b"{}"))

    monkeypatch.setattr("httpx2.HTTPTransport.handle_request", handle)
    public = [(2, 1, 6, "", ("93.184.215.14", 443))]
    monkeypatch.setattr("app.sources.hub.wire.socket.getaddrinfo", lambda *_, **__: public)
    assert refusal(hub).code == "hub_unavailable"
    assert sent == [("127.0.0.1", "Bearer hf_secret", None), ("93.184.215.14", None, "cdn.example.com")]
