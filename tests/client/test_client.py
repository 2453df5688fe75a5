"""The client against services that are slow, broken, or lie."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mergeyard import (
    AccessError,
    ApiError,
    ConflictError,
    DownloadError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from tests.client.conftest import Connect

pytestmark = pytest.mark.usefixtures("pauses")


def refusing(code: str, status: int) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "because", "fault": "user", "problems": []})


class TestRetries:
    def test_a_submission_is_repeated_under_one_idempotency_key(self, connect: Connect) -> None:
        keys = []

        def handler(request: httpx.Request) -> httpx.Response:
            keys.append(request.headers["idempotency-key"])
            if len(keys) < 3:
                raise httpx.ReadError("reset")
            return httpx.Response(202, json={"id": "mrg-1"})

        assert connect(handler).submit({})["id"] == "mrg-1"
        assert len(keys) == 3 and len(set(keys)) == 1

    def test_a_service_that_is_not_ready_is_asked_again_when_it_says(
        self, connect: Connect, pauses: list[float]
    ) -> None:
        answers = [httpx.Response(503, headers={"retry-after": "2"}), httpx.Response(200, json={"id": "mrg-1"})]
        assert connect(lambda _: answers.pop(0)).get("mrg-1")["id"] == "mrg-1"
        assert pauses == [2.0]

    def test_a_rate_limit_is_waited_for(self, connect: Connect, pauses: list[float]) -> None:
        answers = [refusing("rate_limited", 429), httpx.Response(200, json={"id": "mrg-1"})]
        answers[0].headers["retry-after"] = "41"
        assert connect(lambda _: answers.pop(0)).get("mrg-1")["id"] == "mrg-1"
        assert pauses == [41.0]

    def test_an_unreachable_service_is_said_to_be(self, connect: Connect) -> None:
        def handler(_: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        with pytest.raises(UnavailableError, match="mergeyard up") as raised:
            connect(handler).get("mrg-1")
        assert (raised.value.code, raised.value.status) == ("unreachable", 0)

    def test_what_is_wrong_is_not_repeated(self, connect: Connect) -> None:
        asked = []

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return refusing("not_found", 404)

        with pytest.raises(ApiError) as raised:
            connect(handler).get("mrg-1")
        assert (raised.value.code, raised.value.status, len(asked)) == ("not_found", 404, 1)

    def test_a_delete_whose_answer_was_lost_is_done(self, connect: Connect) -> None:
        tries = iter([httpx.ReadError("reset"), refusing("not_found", 404)])

        def handler(_: httpx.Request) -> httpx.Response:
            answer = next(tries)
            if isinstance(answer, Exception):
                raise answer
            return answer

        connect(handler).delete("mrg-1")

    def test_a_page_that_is_not_ours_is_no_crash(self, connect: Connect) -> None:
        with pytest.raises(ApiError) as raised:
            connect(lambda _: httpx.Response(404, text="<html>")).get("mrg-1")
        assert raised.value.code == "unexpected_response"

    def test_a_key_is_sent_as_bearer(self, connect: Connect) -> None:
        def handler(request: httpx.Request) -> httpx.Response:
            assert request.headers["authorization"] == "Bearer secret"
            return httpx.Response(200, json={"items": [], "next_cursor": None})

        connect(handler, api_key="secret").page(status=["queued", "running"])

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, AccessError),
            (403, AccessError),
            (404, NotFoundError),
            (409, ConflictError),
            (413, InvalidRequestError),
            (422, InvalidRequestError),
            (429, RateLimitedError),
            (507, UnavailableError),
            (500, ApiError),
        ],
    )
    def test_errors_are_of_a_kind_and_say_where(self, connect: Connect, status: int, kind: type[ApiError]) -> None:
        place = {"code": "parameter_invalid", "message": "too large", "where": "models[1].parameters.density"}
        answer = {"code": "parameter_invalid", "detail": "too large", "where": place["where"], "problems": [place]}
        with pytest.raises(ApiError) as raised:
            connect(lambda _: httpx.Response(status, json=answer), retries=0).plan({})
        error = raised.value
        assert type(error) is kind
        assert (error.code, error.detail, error.where, error.problems) == (
            "parameter_invalid",
            "too large",
            "models[1].parameters.density",
            [place],
        )

    def test_pauses_grow_and_are_never_quite_the_same(
        self, connect: Connect, pauses: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dice = iter((0.5, 0.75, 1.0))
        monkeypatch.setattr("mergeyard.calls.random.uniform", lambda _low, _high: next(dice))
        answers = [httpx.Response(503) for _ in range(3)] + [httpx.Response(200, json={"id": "mrg-1"})]
        connect(lambda _: answers.pop(0)).get("mrg-1")
        assert pauses == [0.125, 0.375, 1.0]

    def test_a_gateway_may_say_when_by_a_date(self, connect: Connect, pauses: list[float]) -> None:
        answers = [httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})]
        answers += [httpx.Response(503, headers={"retry-after": "soon"}), httpx.Response(200, json={"id": "mrg-1"})]
        connect(lambda _: answers.pop(0)).get("mrg-1")
        assert pauses == [0.0, 0.5], "that was long ago; and what cannot be read is no answer"

    def test_an_upload_is_sent_whole_with_every_try(self, connect: Connect, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(b"{}" * 1000)
        bodies: list[bytes] = []

        def handler(request: httpx.Request) -> httpx.Response:
            bodies.append(request.read())
            if len(bodies) == 1:
                raise httpx.WriteError("reset")
            return httpx.Response(201, json={"reference": "upload:sha256-0"})

        assert connect(handler).upload([tmp_path])["reference"] == "upload:sha256-0"
        assert [body.count(b"{}") for body in bodies] == [1000, 1000]


class TestList:
    def test_goes_through_all_pages_as_they_are_needed(self, connect: Connect) -> None:
        asked: list[dict[str, str]] = []

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(dict(request.url.params))
            start = int(request.url.params.get("cursor", "0"))
            items = [{"id": f"mrg-{number}"} for number in range(start, start + 2)]
            return httpx.Response(200, json={"items": items, "next_cursor": str(start + 2) if start < 4 else None})

        merges = connect(handler).list(status="failed", page_size=2)
        assert [next(merges)["id"] for _ in range(3)] == ["mrg-0", "mrg-1", "mrg-2"]
        assert asked == [{"status": "failed", "limit": "2"}, {"status": "failed", "limit": "2", "cursor": "2"}]
        assert [merge["id"] for merge in merges] == ["mrg-3", "mrg-4", "mrg-5"] and len(asked) == 3


class TestAliases:
    def test_they_are_pointed_read_and_deleted(self, connect: Connect) -> None:
        seen: list[tuple[str, str, bytes]] = []

        def handler(request: httpx.Request) -> httpx.Response:
            seen.append((request.method, request.url.path, request.read()))
            return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json={"merge": "mrg-1"})

        client = connect(handler)
        assert client.point_alias("production", "mrg-1")["merge"] == client.alias("production")["merge"] == "mrg-1"
        client.aliases()
        client.delete_alias("production")
        path = "/aliases/production"
        assert [call[:2] for call in seen] == [("PUT", path), ("GET", path), ("GET", "/aliases"), ("DELETE", path)]
        assert json.loads(seen[0][2]) == {"merge": "mrg-1"}


class TestWait:
    def test_polls_by_etag_and_tells_of_changes_only(self, connect: Connect, pauses: list[float]) -> None:
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
        done = connect(handler).wait("mrg-1", on_update=lambda update: seen.append(update["status"]))
        assert done["status"] == "succeeded"
        assert seen == ["queued", "running", "succeeded"]
        assert sent == [None, *['W/"1"'] * 4, 'W/"2"']
        assert pauses == [1.0, 1.5, 2.25, 3.375, 1.0]

    def test_gives_up_after_its_timeout(self, connect: Connect) -> None:
        answer = {"id": "mrg-1", "status": "running"}
        with pytest.raises(TimeoutError):
            connect(lambda _: httpx.Response(200, json=answer)).wait("mrg-1", timeout=0.5)


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
    def test_fetches_verifies_and_reports(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        seen: list[tuple[int, int, str]] = []
        connect(shop).download("mrg-1", tmp_path / "out", lambda *progress: seen.append(progress))
        for name, data in shop.files.items():
            assert (tmp_path / "out" / name).read_bytes() == data
        assert seen[-1][0] == seen[-1][1] == sum(map(len, shop.files.values()))
        assert not list(tmp_path.rglob("*.part"))

    def test_fetches_several_files_at_once_after_the_manifest(self, connect: Connect, tmp_path: Path) -> None:
        shop = Shop({f"model-{number}.safetensors": WEIGHTS for number in range(4)})
        together = threading.Barrier(4, timeout=30)

        def handler(request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith(".safetensors"):
                together.wait()
            return shop(request)

        connect(handler).download("mrg-1", tmp_path, at_once=4)
        assert shop.requests[0][0] == "mergeyard.json"
        assert all((tmp_path / name).read_bytes() == data for name, data in shop.files.items())

    def test_goes_on_where_a_connection_broke(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        shop.cut = {"model.safetensors": 100_000}
        connect(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
        assert ("model.safetensors", "bytes=100000-") in shop.requests

    def test_goes_on_with_what_an_earlier_run_left(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.part").write_bytes(WEIGHTS[:77_777])
        connect(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
        assert ("model.safetensors", "bytes=77777-") in shop.requests

    def test_does_not_fetch_what_is_there(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        for _ in range(2):
            shop.requests.clear()
            connect(shop).download("mrg-1", tmp_path)
        assert shop.requests == []

    @pytest.mark.parametrize("left", [b"something else entirely", WEIGHTS[:-1] + b"x", WEIGHTS + b"more"])
    def test_starts_again_where_a_leftover_belongs_to_another_file(
        self, connect: Connect, shop: Shop, tmp_path: Path, left: bytes
    ) -> None:
        (tmp_path / "model.safetensors.part").write_bytes(left)
        connect(shop).download("mrg-1", tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS

    def test_refuses_bytes_with_another_digest_and_keeps_none(
        self, connect: Connect, shop: Shop, tmp_path: Path
    ) -> None:
        shop.files["model.safetensors"] = WEIGHTS[:-1] + b"x"
        with pytest.raises(DownloadError) as raised:
            connect(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "digest_mismatch"
        assert not list(tmp_path.glob("model*"))

    @pytest.mark.parametrize("extra", [b"", b"more"])
    def test_refuses_more_or_fewer_bytes_than_announced(
        self, connect: Connect, shop: Shop, tmp_path: Path, extra: bytes
    ) -> None:
        shop.files["config.json"] = extra + b"{}" if extra else b"{"
        with pytest.raises(ApiError):
            connect(shop).download("mrg-1", tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_refuses_a_listing_that_the_manifest_does_not_vouch_for(
        self, connect: Connect, shop: Shop, tmp_path: Path
    ) -> None:
        shop.entries.append(shop._entry("extra.json", b"{}"))
        with pytest.raises(DownloadError) as raised:
            connect(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "digest_mismatch"

    @pytest.mark.parametrize("name", ["../up", "/abs", "a/../../b", "a\\..\\b", "C:x", "", ".", "a//b", "./a", "a\x00"])
    def test_refuses_names_that_lead_outside(self, connect: Connect, tmp_path: Path, name: str) -> None:
        with pytest.raises(DownloadError) as raised:
            connect(Shop({name: b"x"})).download("mrg-1", tmp_path / "out")
        assert raised.value.code == "unsafe_name"
        assert list(tmp_path.iterdir()) == []

    def test_refuses_a_folder_that_is_a_link_to_elsewhere(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DownloadError) as raised:
            connect(shop).download("mrg-1", tmp_path / "out")
        assert raised.value.code == "unsafe_name"
        assert list((tmp_path / "elsewhere").iterdir()) == []

    def test_does_not_replace_another_file(self, connect: Connect, shop: Shop, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("mine")
        with pytest.raises(DownloadError) as raised:
            connect(shop).download("mrg-1", tmp_path)
        assert raised.value.code == "output_exists"
        assert (tmp_path / "config.json").read_text() == "mine"


class TestEvents:
    @staticmethod
    def stream(*messages: str) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(messages))

    @staticmethod
    def event(number: int, kind: str) -> str:
        return f'event: {kind}\ndata: {{"id": {number}, "type": "{kind}", "at": "", "data": {{}}}}\nid: {number}\n\n'

    def test_goes_on_where_a_stream_broke_and_ends_with_the_merge(self, connect: Connect) -> None:
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
        events = connect(handler).events("mrg-1", on_progress=progress.append)
        assert [event["type"] for event in events] == ["submitted", "claimed", "succeeded"]
        assert asked == ["0", "1", "1", "2"] and progress == [{"fraction": 0.5}]

    def test_a_merge_whose_end_is_known_has_nothing_to_tell(self, connect: Connect) -> None:
        assert list(connect(lambda _: httpx.Response(204)).events("mrg-1", after=9)) == []

    def test_gives_up_what_breaks_again_and_again(self, connect: Connect, pauses: list[float]) -> None:
        def handler(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("reset")

        with pytest.raises(ApiError) as raised:
            list(connect(handler, retries=3).events("mrg-1"))
        assert raised.value.code == "unreachable" and len(pauses) == 3

    def test_a_page_that_is_not_ours_is_no_stream(self, connect: Connect) -> None:
        with pytest.raises(ApiError) as raised:
            list(connect(lambda _: httpx.Response(200, text="<html>")).events("mrg-1"))
        assert raised.value.code == "unexpected_response"
