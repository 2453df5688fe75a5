"""POST /uploads and GET /sources."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.api.examples import RECIPE
from app.api.multipart import file_parts
from app.errors import MergeyardError
from tests import files
from tests.api.serving import ServedApi, problem


def parts_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def left_behind(api: ServedApi) -> list[str]:
    """Half-finished uploads still in the store."""
    return [path.name for path in api.settings.uploads.glob(".*")] if api.settings.uploads.exists() else []


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return files.write_adapter(tmp_path / "adapter", files.lora_tensors(seed=77))


class TestAnUpload:
    def test_gets_a_reference_that_recipes_can_name(self, api: ServedApi, adapter: Path) -> None:
        response = api.http.post("/uploads", files=parts_of(adapter))
        assert response.status_code == 201, response.text
        upload = response.json()
        assert upload["kind"] == "adapter"
        assert [file["name"] for file in upload["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
        recipe = {**RECIPE, "models": [{"adapter": upload["reference"]}]}
        assert api.http.post("/merges/plan", json={"recipe": recipe}).status_code == 200
        listed = api.http.get("/sources").json()["items"]
        assert upload["reference"] in [item["reference"] for item in listed]

    def test_of_the_same_files_has_the_same_reference(self, api: ServedApi, adapter: Path) -> None:
        first = api.http.post("/uploads", files=parts_of(adapter))
        again = api.http.post("/uploads", files=parts_of(adapter)[::-1])
        assert again.status_code == 200
        assert again.json()["reference"] == first.json()["reference"]

    def test_of_a_whole_model_works_too(self, api: ServedApi, tmp_path: Path) -> None:
        folder = files.write_model(tmp_path / "model", files.llama_tensors(seed=5))
        response = api.http.post("/uploads", files=parts_of(folder))
        assert response.json()["kind"] == "model"
        assert left_behind(api) == []


class TestABadUpload:
    @pytest.mark.parametrize(
        ("name", "data", "code"),
        [
            ("pytorch_model.bin", b"\x80\x04.", "pickle_refused"),
            ("../escape.safetensors", b"", "request_invalid"),
            ("script.py", b"print()", "request_invalid"),
            ("adapter_config.json", b"{}", "request_invalid"),
        ],
    )
    def test_is_refused_and_leaves_nothing(
        self, api: ServedApi, adapter: Path, name: str, data: bytes, code: str
    ) -> None:
        before = sorted(api.settings.uploads.iterdir()) if api.settings.uploads.exists() else []
        problem(api.http.post("/uploads", files=[*parts_of(adapter), ("files", (name, data))]), 422, code)
        assert left_behind(api) == []
        assert sorted(api.settings.uploads.iterdir()) == before

    def test_with_damaged_weights_is_refused(self, api: ServedApi, adapter: Path) -> None:
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        problem(api.http.post("/uploads", files=parts_of(adapter)), 422, "source_format")
        assert left_behind(api) == []

    @pytest.mark.parametrize(
        ("name", "content", "code"),
        [
            ("adapter_config.json", b'{"r": 2, "rank_pattern": {"((a?){99999}){99999}": 2}}', "adapter_invalid"),
            ("adapter_config.json", b'{"r": 2, "eva_config": ' + b"[" * 9000 + b"]" * 9000 + b"}", "source_format"),
            ("adapter_config.json", b'{"r": 2, "lora_alpha": NaN}', "source_format"),
            ("adapter_config.json", b'{"base_model_name_or_path": "\\ud800"}', "source_format"),
            ("adapter_model.safetensors", b"\xff" * 64, "source_format"),
            ("adapter_model.safetensors", b"\x08" + bytes(7) + b'{"a":NaN', "source_format"),
        ],
    )
    def test_of_a_hostile_file_is_refused_and_leaves_nothing(
        self, api: ServedApi, adapter: Path, name: str, content: bytes, code: str
    ) -> None:
        (adapter / name).write_bytes(content)
        problem(api.http.post("/uploads", files=parts_of(adapter)), 422, code)
        assert left_behind(api) == []

    def test_with_a_plain_form_field_is_refused(self, api: ServedApi, adapter: Path) -> None:
        response = api.http.post("/uploads", files=parts_of(adapter), data={"name": "mine"})
        assert "'name'" in problem(response, 422, "request_invalid")["detail"]

    def test_without_files_is_refused(self, api: ServedApi) -> None:
        body = b"--x--\r\n"
        response = api.http.post("/uploads", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
        assert response.status_code == 422

    def test_of_another_content_type_is_refused(self, api: ServedApi) -> None:
        problem(api.http.post("/uploads", json={}), 415, "unsupported_media_type")
        response = api.http.post("/uploads", content=b"", headers={"content-type": "multipart/form-data"})
        problem(response, 415, "unsupported_media_type")

    def test_over_the_limit_is_refused_and_leaves_nothing(self, api: ServedApi, adapter: Path) -> None:
        def body() -> Iterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.safetensors"\r\n\r\n'
            for _ in range(60):
                yield bytes(50_000)

        response = api.http.post(
            "/uploads", content=body(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        problem(response, 413, "body_too_large")
        assert left_behind(api) == []

    @pytest.mark.parametrize(
        ("number", "status", "code"),
        [
            (errno.ENOSPC, 507, "disk_full"),
            (errno.EDQUOT, 507, "disk_full"),
            (errno.EFBIG, 507, "disk_full"),
            (errno.EIO, 500, "internal"),
            (errno.EACCES, 500, "internal"),
        ],
    )
    def test_of_the_disk_is_told_apart(
        self,
        api: ServedApi,
        adapter: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        status: int,
        code: str,
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(number, "secret inside")

        with monkeypatch.context() as patched:
            patched.setattr("app.sources.uploads.os.fsync", fail)
            response = api.http.post("/uploads", files=parts_of(adapter))
        assert "secret" not in problem(response, status, code)["detail"]
        assert left_behind(api) == []

    def test_that_is_cut_short_leaves_nothing(self, api: ServedApi) -> None:
        place = urlsplit(api.url)
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(
                b"POST /uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
                b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.safetensors"\r\n\r\n' + bytes(1000)
            )
            wait_until(lambda: left_behind(api) != [])
        wait_until(lambda: left_behind(api) == [])


@pytest.fixture
def abandoned(tmp_path: Path) -> Path:
    """What an API that was killed left in the data folder of ``fresh_api``."""
    staging = tmp_path / "data" / "uploads" / ".staging-0123456789abcdef"
    staging.mkdir(parents=True)
    os.utime(staging, (0, 0))
    return staging


def test_what_a_killed_api_left_is_swept_by_the_next(abandoned: Path, fresh_api: ServedApi) -> None:
    wait_until(lambda: not abandoned.exists())
    assert left_behind(fresh_api) == []


def wait_until(condition) -> None:
    import time

    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestTheParser:
    BODY = (
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="one.json"\r\n\r\n{"a": 1}\r\n'
        b'--b\r\nContent-Type: x/y\r\nContent-Disposition: form-data; name="f"; filename="two"\r\n\r\n\r\n--not\r\n'
        b"--b--\r\n"
    )

    @pytest.mark.parametrize("step", [1, 2, 7, 30, 1000])
    def test_does_not_care_where_the_body_is_cut(self, step: int) -> None:
        pieces = (self.BODY[start : start + step] for start in range(0, len(self.BODY), step))
        found = [(name, b"".join(chunks)) for name, chunks in file_parts(pieces, b"b")]
        assert found == [("one.json", b'{"a": 1}'), ("two", b"\r\n--not")]

    @pytest.mark.parametrize("kept", [0, 10, 60, 75, 120, 170])
    def test_notices_a_body_that_ends_early(self, kept: int) -> None:
        with pytest.raises(MergeyardError) as raised:
            for _, chunks in file_parts(iter([self.BODY[:kept]]), b"b"):
                b"".join(chunks)
        assert raised.value.code == "request_invalid"


def test_sources_lists_models_and_adapters_by_reference(api: ServedApi) -> None:
    found = {item["reference"]: item for item in api.http.get("/sources").json()["items"]}
    assert found["models:smollm2-135m-instruct"]["kind"] == "model"
    assert found["models:adapters/sql"]["kind"] == "adapter"
    assert found["models:smollm2-135m-instruct"]["size"] > 0
    assert json.dumps(found)
