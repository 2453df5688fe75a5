"""The client against services that are slow, broken, or lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeyard.client import ApiError, Client

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits; what the client would have waited is kept."""
    made: list[float] = []
    monkeypatch.setattr("time.sleep", made.append)
    return made


def client(handler: Handler, **options: Any) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler), **options)


def refusing(code: str, status: int) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "because", "fault": "user", "problems": []})


class TestRetries:
    def test_a_submission_is_repeated_under_one_idempotency_key(self) -> None:
        keys = []

        def handler(request: httpx.Request) -> httpx.Response:
            keys.append(request.headers["idempotency-key"])
            if len(keys) < 3:
                raise httpx.ReadError("reset")
            return httpx.Response(202, json={"id": "mrg-1"})

        assert client(handler).submit({})["id"] == "mrg-1"
        assert len(keys) == 3 and len(set(keys)) == 1

    def test_a_service_that_is_not_ready_is_asked_again_when_it_says(self, pauses: list[float]) -> None:
        answers = [httpx.Response(503, headers={"retry-after": "2"}), httpx.Response(200, json={"id": "mrg-1"})]
        assert client(lambda _: answers.pop(0)).get("mrg-1")["id"] == "mrg-1"
        assert pauses == [2.0]

    def test_a_rate_limit_is_waited_for(self, pauses: list[float]) -> None:
        answers = [refusing("rate_limited", 429), httpx.Response(200, json={"id": "mrg-1"})]
        answers[0].headers["retry-after"] = "41"
        assert client(lambda _: answers.pop(0)).get("mrg-1")["id"] == "mrg-1"
        assert pauses == [41.0]

    def test_an_unreachable_service_is_said_to_be(self) -> None:
        def handler(_: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        with pytest.raises(ApiError, match="mergeyard up") as raised:
            client(handler).get("mrg-1")
        assert (raised.value.code, raised.value.status) == ("unreachable", 0)

    def test_what_is_wrong_is_not_repeated(self) -> None:
        asked = []

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return refusing("not_found", 404)

        with pytest.raises(ApiError) as raised:
            client(handler).get("mrg-1")
        assert (raised.value.code, raised.value.status, len(asked)) == ("not_found", 404, 1)

    def test_a_delete_whose_answer_was_lost_is_done(self) -> None:
        tries = iter([httpx.ReadError("reset"), refusing("not_found", 404)])

        def handler(_: httpx.Request) -> httpx.Response:
            answer = next(tries)
            if isinstance(answer, Exception):
                raise answer
            return answer

        client(handler).delete("mrg-1")

    def test_a_page_that_is_not_ours_is_no_crash(self) -> None:
        with pytest.raises(ApiError) as raised:
            client(lambda _: httpx.Response(404, text="<html>")).get("mrg-1")
        assert raised.value.code == "unexpected_response"

    def test_a_key_is_sent_as_bearer(self) -> None:
        def handler(request: httpx.Request) -> httpx.Response:
            assert request.headers["authorization"] == "Bearer secret"
            return httpx.Response(200, json={"items": [], "next_cursor": None})

        client(handler, api_key="secret").list(status=["queued", "running"])


class TestWait:
    def test_polls_by_etag_and_tells_of_changes_only(self, pauses: list[float]) -> None:
        def merge(status: str, version: int) -> httpx.Response:
            headers = {"etag": f'W/"{version}"', "retry-after": "1"}
            return httpx.Response(200, json={"id": "mrg-1", "status": status}, headers=headers)

        unchanged = httpx.Response(304, headers={"retry-after": "1"})
        answers = [merge("queued", 1), unchanged, unchanged, unchanged, merge("running", 2), merge("succeeded", 3)]
        sent = []

        def handler(request: httpx.Request) -> httpx.Response:
            sent.append(request.headers.get("if-none-match"))
            return answers.pop(0)

        seen: list[str] = []
        done = client(handler).wait("mrg-1", on_update=lambda update: seen.append(update["status"]))
        assert done["status"] == "succeeded"
        assert seen == ["queued", "running", "succeeded"]
        assert sent == [None, *['W/"1"'] * 4, 'W/"2"']
        assert pauses == [1.0, 1.5, 2.25, 3.375, 1.0]

    def test_gives_up_after_its_timeout(self) -> None:
        answer = {"id": "mrg-1", "status": "running"}
        with pytest.raises(TimeoutError):
            client(lambda _: httpx.Response(200, json=answer)).wait("mrg-1", timeout=0.5)


class Shop:
    """A service with one artifact, which breaks as it is told to."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.entries = [self._entry(name, data) for name, data in files.items()]
        self.files["mergeyard.json"] = json.dumps({"files": self.entries}).encode()
        self.entries = [self._entry("mergeyard.json", self.files["mergeyard.json"]), *self.entries]
        self.requests: list[tuple[str, str | None]] = []
        self.cut: dict[str, int] = {}  # the bytes after which a file's connection breaks, once

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        url = f"/merges/mrg-1/files/{name}"
        return {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "url": url}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.removeprefix("/merges/mrg-1/files").lstrip("/")
        if not name:
            size = sum(entry["size"] for entry in self.entries)
            manifest_sha256 = self.entries[0]["sha256"]
            return httpx.Response(200, json={"items": self.entries, "size": size, "manifest_sha256": manifest_sha256})
        wanted = request.headers.get("range")
        self.requests.append((name, wanted))
        data = self.files[name]
        whole = next(entry for entry in self.entries if entry["name"] == name)
        start = 0
        if wanted and request.headers["if-range"] == f'"{whole["sha256"]}"':
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        return httpx.Response(206 if start else 200, content=self._stream(name, data[start:]))

    def _stream(self, name: str, data: bytes) -> Iterator[bytes]:
        cut = self.cut.pop(name, None)
        yield data[:cut]
        if cut is not None:
            raise httpx.ReadError("cut")


WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def shop() -> Shop:
    return Shop({"model.safetensors": WEIGHTS, "config.json": b"{}", "sub/notes.txt": b"hello", "empty": b""})


class TestDownload:
    def test_fetches_verifies_and_reports(self, shop: Shop, tmp_path: Path) -> None:
        seen: list[tuple[int, int, str]] = []
        client(shop).download("mrg-1", tmp_path / "out", lambda *progress: seen.append(progress))
        for name, data in shop.files.items():
            assert (tmp_path / "out" / name).read_bytes() == data
        assert seen[-1][0] == seen[-1][1] == sum(map(len, shop.files.values()))
        assert not list(tmp_path.rglob("*.part"))

    def test_goes_on_where_a_connection_broke(self, shop: Shop, tmp_path: Path) -> None:
        shop.cut = {"model.safetensors": 100_000}
        client(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
        assert ("model.safetensors", "bytes=100000-") in shop.requests

    def test_goes_on_with_what_an_earlier_run_left(self, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.part").write_bytes(WEIGHTS[:77_777])
        client(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
        assert ("model.safetensors", "bytes=77777-") in shop.requests

    def test_does_not_fetch_what_is_there(self, shop: Shop, tmp_path: Path) -> None:
        for _ in range(2):
            shop.requests.clear()
            client(shop).download("mrg-1", tmp_path)
        assert shop.requests == []

    @pytest.mark.parametrize("left", [b"something else entirely", WEIGHTS[:-1] + b"x", WEIGHTS + b"more"])
    def test_starts_again_where_a_leftover_belongs_to_another_file(
        self, shop: Shop, tmp_path: Path, left: bytes
    ) -> None:
        (tmp_path / "model.safetensors.part").write_bytes(left)
        client(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS

    def test_refuses_bytes_with_another_digest_and_keeps_none(self, shop: Shop, tmp_path: Path) -> None:
        shop.files["model.safetensors"] = WEIGHTS[:-1] + b"x"
        with pytest.raises(ApiError) as raised:
            client(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "digest_mismatch"
        assert not list(tmp_path.glob("model*"))

    @pytest.mark.parametrize("extra", [b"", b"more"])
    def test_refuses_more_or_fewer_bytes_than_announced(self, shop: Shop, tmp_path: Path, extra: bytes) -> None:
        shop.files["config.json"] = extra + b"{}" if extra else b"{"
        with pytest.raises(ApiError):
            client(shop).download("mrg-1", tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_refuses_a_listing_that_the_manifest_does_not_vouch_for(self, shop: Shop, tmp_path: Path) -> None:
        shop.entries.append(shop._entry("extra.json", b"{}"))
        with pytest.raises(ApiError) as raised:
            client(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "digest_mismatch"

    @pytest.mark.parametrize("name", ["../up", "/abs", "a/../../b", "a\\..\\b", "C:x", "", ".", "a//b", "./a", "a\x00"])
    def test_refuses_names_that_lead_outside(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ApiError) as raised:
            client(Shop({name: b"x"})).download("mrg-1", tmp_path / "out")
        assert raised.value.code == "unsafe_name"
        assert list(tmp_path.iterdir()) == []

    def test_refuses_a_folder_that_is_a_link_to_elsewhere(self, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ApiError) as raised:
            client(shop).download("mrg-1", tmp_path / "out")
        assert raised.value.code == "unsafe_name"
        assert list((tmp_path / "elsewhere").iterdir()) == []

    def test_does_not_replace_another_file(self, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("mine")
        with pytest.raises(ApiError) as raised:
            client(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "output_exists"
        assert (tmp_path / "config.json").read_text() == "mine"


class TestFollow:
    @staticmethod
    def stream(*messages: str) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(messages))

    @staticmethod
    def event(number: int, kind: str) -> str:
        return f'event: {kind}\ndata: {{"id": {number}, "type": "{kind}", "at": "", "data": {{}}}}\nid: {number}\n\n'

    def test_goes_on_where_a_stream_broke_and_ends_with_the_merge(self) -> None:
        asked: list[str] = []
        answers = [
            self.stream("retry: 2000\n\n", self.event(1, "submitted"), ": still here\n\n", "event: claimed\ndata: {"),
            httpx.Response(503, headers={"retry-after": "2"}),
            self.stream(self.event(2, "claimed"), 'event: progress\ndata: {"fraction": 0.5}\n\n'),
            self.stream(self.event(3, "succeeded"), self.event(4, "never")),
        ]

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(request.headers["last-event-id"])
            assert request.headers["accept"] == "text/event-stream"
            return answers.pop(0)

        progress: list[Any] = []
        events = client(handler).follow("mrg-1", on_progress=progress.append)
        assert [event["type"] for event in events] == ["submitted", "claimed", "succeeded"]
        assert asked == ["0", "1", "1", "2"] and progress == [{"fraction": 0.5}]

    def test_a_merge_whose_end_is_known_has_nothing_to_tell(self) -> None:
        assert list(client(lambda _: httpx.Response(204)).follow("mrg-1", after=9)) == []

    def test_gives_up_what_breaks_again_and_again(self, pauses: list[float]) -> None:
        def handler(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("reset")

        with pytest.raises(ApiError) as raised:
            list(client(handler, retries=3).follow("mrg-1"))
        assert raised.value.code == "unreachable" and len(pauses) == 3

    def test_a_page_that_is_not_ours_is_no_stream(self) -> None:
        with pytest.raises(ApiError) as raised:
            list(client(lambda _: httpx.Response(200, text="<html>")).follow("mrg-1"))
        assert raised.value.code == "unexpected_response"
