"""Downloads: single files and the tar, whole and in part."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
import psutil
import pytest
from starlette.responses import StreamingResponse

from app.api import transfer
from app.api.archive import tar_segments
from app.artifacts.manifest import MANIFEST_NAME, StoredFile
from app.artifacts.store import LocalFile, LocalStore, Opened
from app.records.job import Job
from tests.api.serving import ServedApi, problem

WEIGHTS = bytes(range(256)) * 40_000  # 10 MB: more than one piece
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "empty.txt": b"", "chat template.jinja": b"{{ x }}"}


@pytest.fixture(scope="module")
def job(api: ServedApi) -> Job:
    return api.published(FILES)


def get(api: ServedApi, job: Job, name: str = "model.safetensors", **headers: str) -> httpx.Response:
    return api.http.get(f"/merges/{job.id}/files/{name}", headers={k.replace("_", "-"): v for k, v in headers.items()})


class TestListing:
    def test_names_every_file_with_size_and_digest_the_manifest_first(self, api: ServedApi, job: Job) -> None:
        listing = api.http.get(f"/merges/{job.id}/files").json()
        assert [item["name"] for item in listing["items"]] == [MANIFEST_NAME, *FILES]
        for item in listing["items"]:
            data = api.http.get(item["url"]).content
            assert (len(data), hashlib.sha256(data).hexdigest()) == (item["size"], item["sha256"])
        assert listing["size"] == sum(item["size"] for item in listing["items"])
        assert listing["manifest_sha256"] == listing["items"][0]["sha256"]

    @pytest.mark.parametrize("path", ["files", "files/config.json", "archive.tar"])
    def test_an_unfinished_merge_has_no_files_yet(self, api: ServedApi, path: str) -> None:
        document = problem(api.http.get(f"/merges/{api.queued().id}/{path}"), 409, "conflict")
        assert "poll" in document["detail"]

    def test_a_cancelled_merge_never_will(self, api: ServedApi) -> None:
        job = api.jobs.request_cancel(api.queued().id)
        assert "poll" not in problem(api.http.get(f"/merges/{job.id}/files"), 409, "conflict")["detail"]


class TestAFile:
    def test_comes_whole_with_its_length_and_digests(self, api: ServedApi, job: Job) -> None:
        response = get(api, job)
        digest = hashlib.sha256(WEIGHTS)
        assert response.status_code == 200
        assert response.content == WEIGHTS
        assert response.headers["content-length"] == str(len(WEIGHTS))
        assert response.headers["etag"] == f'"{digest.hexdigest()}"'
        assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert response.headers["accept-ranges"] == "bytes"
        assert response.headers["content-type"] == "application/octet-stream"
        assert "content-encoding" not in response.headers

    def test_head_tells_the_same_without_the_bytes(self, api: ServedApi, job: Job) -> None:
        whole = get(api, job)
        head = api.http.head(f"/merges/{job.id}/files/model.safetensors", headers={"range": "bytes=0-9"})
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-length", "etag", "repr-digest", "accept-ranges", "content-type"):
            assert head.headers[name] == whole.headers[name]

    def test_with_a_space_in_its_name_or_nothing_in_it_is_served(self, api: ServedApi, job: Job) -> None:
        assert get(api, job, "chat%20template.jinja").content == b"{{ x }}"
        assert get(api, job, "empty.txt").headers["content-length"] == "0"
        assert get(api, job, "config.json").headers["content-type"] == "application/json"

    def test_is_not_sent_to_who_has_it(self, api: ServedApi, job: Job) -> None:
        etag = get(api, job).headers["etag"]
        response = get(api, job, If_None_Match=f'"other", W/{etag}')
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)

    @pytest.mark.parametrize(
        "name",
        ["nowhere", "../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "./config.json", "a%00", ""],
    )
    def test_of_another_name_does_not_exist(self, api: ServedApi, job: Job, name: str) -> None:
        place = urlsplit(api.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=10)
        connection.request("GET", f"/merges/{job.id}/files/{name}")  # as it is: httpx would resolve the dots
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["code"]) == (404, "not_found")
        connection.close()


class TestARange:
    @pytest.mark.parametrize(
        ("header", "start", "end"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=100-199", 100, 200),
            ("bytes=5000000-", 5_000_000, len(WEIGHTS)),
            ("bytes=-7", len(WEIGHTS) - 7, len(WEIGHTS)),
            ("bytes=-999999999", 0, len(WEIGHTS)),
            ("bytes=4194300-4194310", 4_194_300, 4_194_311),
            ("bytes=10-99999999999", 10, len(WEIGHTS)),
            ("BYTES=1-2", 1, 3),
        ],
    )
    def test_is_sent_alone(self, api: ServedApi, job: Job, header: str, start: int, end: int) -> None:
        response = get(api, job, Range=header)
        assert response.status_code == 206
        assert response.content == WEIGHTS[start:end]
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(WEIGHTS)}"
        assert response.headers["content-length"] == str(end - start)

    @pytest.mark.parametrize("header", [f"bytes={len(WEIGHTS)}-", "bytes=99999999999-", "bytes=-0"])
    def test_outside_the_file_cannot_be_satisfied(self, api: ServedApi, job: Job, header: str) -> None:
        response = get(api, job, Range=header)
        problem(response, 416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{len(WEIGHTS)}"

    def test_of_an_empty_file_cannot_be_satisfied(self, api: ServedApi, job: Job) -> None:
        problem(get(api, job, "empty.txt", Range="bytes=0-"), 416, "range_not_satisfiable")

    @pytest.mark.parametrize("header", ["bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", "bytes=-", "bytes 0-1"])
    def test_that_a_server_may_ignore_gives_the_whole_file(self, api: ServedApi, job: Job, header: str) -> None:
        response = get(api, job, Range=header)
        assert (response.status_code, len(response.content)) == (200, len(WEIGHTS))

    def test_under_if_range_is_sent_only_while_the_etag_holds(self, api: ServedApi, job: Job) -> None:
        etag = get(api, job).headers["etag"]
        assert get(api, job, Range="bytes=0-9", If_Range=etag).status_code == 206
        for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
            assert get(api, job, Range="bytes=0-9", If_Range=other).status_code == 200
        assert get(api, job, Range="bytes=99999999999-", If_Range='"other"').status_code == 200

    def test_a_download_cut_anywhere_can_be_put_together(self, api: ServedApi, job: Job) -> None:
        pieces = [
            get(api, job, Range=f"bytes={start}-{start + 2_999_999}").content
            for start in range(0, 10_240_000, 3_000_000)
        ]
        assert b"".join(pieces) == WEIGHTS


class TestTheTar:
    def test_holds_the_files_and_has_the_length_it_announced(self, api: ServedApi, job: Job) -> None:
        response = api.http.get(f"/merges/{job.id}/archive.tar")
        assert response.headers["content-length"] == str(len(response.content))
        assert response.headers["content-type"] == "application/x-tar"
        with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        assert {name: members[name] for name in FILES} == FILES
        assert members[MANIFEST_NAME] == api.http.get(f"/merges/{job.id}/files/{MANIFEST_NAME}").content
        assert len(members) == len(FILES) + 1

    def test_is_the_same_every_time_and_for_every_merge_of_the_same_files(self, api: ServedApi, job: Job) -> None:
        first = api.http.get(f"/merges/{job.id}/archive.tar")
        other = api.http.get(f"/merges/{api.published(FILES).id}/archive.tar")
        assert first.content == other.content
        assert first.headers["etag"] == other.headers["etag"]

    def test_resumes_like_a_file(self, api: ServedApi, job: Job) -> None:
        path = f"/merges/{job.id}/archive.tar"
        whole = api.http.get(path)
        for start in (0, 100, 511, 512, 5_000_000, len(whole.content) - 1):
            headers = {"range": f"bytes={start}-", "if-range": whole.headers["etag"]}
            part = api.http.get(path, headers=headers)
            assert (part.status_code, part.content) == (206, whole.content[start:])
        head = api.http.head(path)
        assert head.headers["content-length"] == whole.headers["content-length"]

    def test_can_hold_more_than_8_gb_and_long_names(self) -> None:
        size = 20_000_000_000
        segments = tar_segments([StoredFile(name="n" * 150, key="k", size=size, sha256="")])
        header = segments[0]
        assert isinstance(header, bytes)
        member = tarfile.open(fileobj=io.BytesIO(header + bytes(10_240)), mode="r|").next()  # noqa: SIM115
        assert member is not None and (member.size, member.name) == (size, "n" * 150)


def test_a_file_that_vanished_from_the_store_is_an_error_and_no_half_download(api: ServedApi) -> None:
    job = api.published({"model.safetensors": b"x" * 100})
    assert job.artifact is not None
    api.store.path(job.artifact["files"][1]["key"]).write_bytes(b"x" * 50)
    problem(get(api, job), 500, "internal")
    problem(api.http.get(f"/merges/{job.id}/archive.tar"), 500, "internal")


def test_a_download_goes_on_while_its_merge_is_deleted(api: ServedApi) -> None:
    job = api.published({"model.safetensors": WEIGHTS * 3})
    with api.http.stream("GET", f"/merges/{job.id}/files/model.safetensors") as response:
        pieces = response.iter_bytes(100_000)
        received = len(next(pieces))
        assert httpx.delete(f"{api.url}/merges/{job.id}").status_code == 204
        received += sum(map(len, pieces))
    assert received == 3 * len(WEIGHTS)


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_the_tar_goes_on_while_its_merge_is_deleted_though_most_of_its_files_were_not_begun(
    api: ServedApi, start: int
) -> None:
    contents = {f"model-{number}.safetensors": WEIGHTS for number in range(4)}
    job = api.published(contents)
    path, headers = f"/merges/{job.id}/archive.tar", {"range": f"bytes={start}-"}
    whole = api.http.get(path).content
    with api.http.stream("GET", path, headers=headers) as response:
        pieces = response.iter_bytes(100_000)
        received = next(pieces)
        assert httpx.delete(f"{api.url}/merges/{job.id}").status_code == 204
        assert list(api.store.keys(job.id)) == [], "the files are gone, and go on being read"
        received += b"".join(pieces)
    assert received == whole[start:]


@pytest.mark.parametrize("path", ["files/model.safetensors", "archive.tar"])
def test_a_merge_that_is_deleted_between_the_look_and_the_opening_is_not_found(
    api: ServedApi, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = api.published({"model.safetensors": b"x" * 100})
    looked_up = LocalStore.open

    def delete_first(store: LocalStore, key: str, offset: int = 0) -> Opened:
        if api.store.path(key).exists():
            assert httpx.delete(f"{api.url}/merges/{job.id}").status_code == 204
        return looked_up(store, key, offset)

    monkeypatch.setattr(LocalStore, "open", delete_first)
    problem(api.http.get(f"/merges/{job.id}/{path}"), 404, "not_found")


class TestHowBytesAreSent:
    """By the kernel where the server offers that, else read: the same bytes, and the same cut where they run out."""

    @staticmethod
    def sent(folder: Path, extensions: dict[str, Any], size: int, *, cached: bool = True) -> list[dict[str, Any]]:
        """The messages of an answer of 3 bytes, the file's first ``size`` and 2 bytes."""
        path = folder / "file"
        path.write_bytes(WEIGHTS)
        messages: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            messages.append(message)

        async def receive() -> Any:
            await anyio.sleep_forever()

        opened = transfer._Opened("key", LocalFile(path, 0), 0, size)
        response = transfer.Transfer([b"abc", opened, b"de"], status_code=200, headers={})
        scope = {"type": "http", "extensions": extensions, "asgi": {"spec_version": "2.3"}}
        anyio.run(response, scope, receive, send)
        assert opened.file.local.closed
        return messages

    @pytest.mark.parametrize("cached", [True, False])
    def test_by_the_kernel_in_pieces_that_follow_each_other(
        self, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not cached:
            monkeypatch.setattr(transfer, "_cached", lambda *_: False)
        size = 2 * transfer.PIECE_BYTES + 5
        start, first, *pieces, last, end = self.sent(tmp_path, {transfer.ZERO_COPY: {}}, size)
        assert (start["status"], first["body"], last["body"]) == (200, b"abc", b"de")
        assert not end["more_body"] and end["body"] == b""
        assert {piece["type"] for piece in pieces} == {transfer.ZERO_COPY}
        assert [(piece["offset"], piece["count"]) for piece in pieces] == [
            (0, transfer.PIECE_BYTES),
            (transfer.PIECE_BYTES, transfer.PIECE_BYTES),
            (2 * transfer.PIECE_BYTES, 5),
        ]

    def test_read_where_the_server_does_not_offer_that(self, tmp_path: Path) -> None:
        _, *pieces = self.sent(tmp_path, {}, 5_000_000)
        assert b"".join(piece["body"] for piece in pieces) == b"abc" + WEIGHTS[:5_000_000] + b"de"

    def test_the_server_of_the_service_offers_it(
        self, api: ServedApi, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*_: Any) -> None:
            raise AssertionError("read by Python")

        monkeypatch.setattr(transfer, "_cached", lambda *_: True)
        monkeypatch.setattr(os, "pread", never)
        monkeypatch.setattr(StreamingResponse, "stream_response", never)
        assert get(api, job).content == WEIGHTS

    def test_a_file_that_ends_early_cuts_the_connection(self, api: ServedApi) -> None:
        job = api.published({"model.safetensors": WEIGHTS * 5})
        assert job.artifact is not None
        path = api.store.path(job.artifact["files"][1]["key"])
        with (
            pytest.raises(httpx.RemoteProtocolError),
            api.http.stream("GET", f"/merges/{job.id}/files/model.safetensors") as response,
        ):
            assert response.status_code == 200
            os.truncate(path, 20_000_000)
            for _ in response.iter_bytes(100_000):
                pass
        assert api.http.get("/healthz").status_code == 200


def test_a_reader_that_goes_away_leaves_no_file_open(api: ServedApi) -> None:
    job = api.published({"model.safetensors": WEIGHTS * 5})
    for path in ["files/model.safetensors", "archive.tar"] * 3:
        with api.http.stream("GET", f"/merges/{job.id}/{path}") as response:
            next(response.iter_bytes(1000))

    def still_open() -> list[str]:
        return [file.path for file in psutil.Process().open_files() if job.id in file.path]

    deadline = time.monotonic() + 5
    while still_open():
        assert time.monotonic() < deadline
        time.sleep(0.02)
