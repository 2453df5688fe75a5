"""Every kind of bad input: a clear problem with a stable code, and nothing queued or left behind."""

from __future__ import annotations

import base64
import http.client
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

from app.api.examples import RECIPE
from app.errors import MergeyardError
from tests import files
from tests.api.serving import ServedApi, problem

JSON = {"content-type": "application/json"}


def post(api: ServedApi, body: object) -> Any:
    return api.http.post("/merges", json=body)


def recipe(**changes: object) -> dict[str, Any]:
    return {"recipe": {**RECIPE, **changes}}


@pytest.fixture(scope="session")
def damaged(sources_root: Path) -> Path:
    """Sources with something wrong, below the same root."""
    folder = sources_root / "bad"
    whole = (sources_root / "smollm2-135m-instruct" / "model.safetensors").read_bytes()
    truncated = files.write_model(folder / "truncated")
    (truncated / "model.safetensors").write_bytes(whole[:-8])
    overlapping = files.write_model(folder / "overlapping")
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(header).encode()
    (overlapping / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    torch.save({}, pickled / "pytorch_model.bin")
    wider = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in files.lora_tensors().items()}
    files.write_adapter(folder / "wider", wider)
    unmatched = {key.replace("layers", "stages"): value for key, value in files.lora_tensors().items()}
    files.write_adapter(folder / "unmatched", unmatched)
    outside = folder.parent.parent / "outside"
    files.write_model(outside)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    save_file({"x": torch.zeros(1)}, folder / "loose.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"base_model": "models:nowhere"}, "source_not_found", "base_model"),
        ({"base_model": "models:bad/truncated"}, "source_format", "base_model"),
        ({"base_model": "models:bad/overlapping"}, "source_format", "base_model"),
        ({"base_model": "models:bad/pickled"}, "pickle_refused", "base_model"),
        ({"base_model": "models:../outside"}, "path_outside_roots", "base_model"),
        ({"base_model": "models:bad/link"}, "path_outside_roots", "base_model"),
        ({"base_model": "models:/etc"}, "path_outside_roots", "base_model"),
        ({"base_model": "/etc"}, "path_outside_roots", "base_model"),
        ({"base_model": "ftp:somewhere"}, "reference_invalid", "base_model"),
        ({"base_model": "hf:org/name"}, "hub_not_allowed", "base_model"),
        ({"models": [{"adapter": "models:bad/wider"}]}, "adapter_shape", "models[0]"),
        ({"models": [{"adapter": "models:bad/unmatched"}]}, "adapter_mismatch", "models[0]"),
        ({"models": []}, "no_sources", "models"),
        ({"models": None}, "no_sources", "models"),
        ({"merge_method": "tiez"}, "unknown_method", "merge_method"),
        ({"evaluation": {"tasks": []}}, "recipe_invalid", "evaluation.tasks"),
        ({"evaluation": {"tasks": [{"file": "models:x.jsonl"}]}}, "source_not_found", "evaluation.tasks[0].file"),
        (
            {"evaluation": {"tasks": [{"file": "shipped:article-sql"}]}},
            "chat_template_missing",
            "evaluation.tasks[0].file",
        ),
        ({"out_dtpe": "float32"}, "unknown_key", "out_dtpe"),
        ({"parameters": {"density": 1.5}}, "parameter_invalid", "parameters.density"),
        ({"parameters": {"density": -0.1}}, "parameter_invalid", "parameters.density"),
        ({"parameters": {"lamda": 1}}, "unknown_key", "parameters.lamda"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_place(
    api: ServedApi, damaged: Path, changes: dict[str, object], code: str, where: str
) -> None:
    document = problem(post(api, recipe(**changes)), 422, code)
    assert document["where"].startswith(where)
    assert document["fault"] == "user"


def test_nothing_bad_is_queued(fresh_api: ServedApi) -> None:
    post(fresh_api, recipe(base_model="models:nowhere"))
    post(fresh_api, {})
    assert fresh_api.http.get("/merges").json()["items"] == []


class TestTheEnvelope:
    @pytest.mark.parametrize(
        ("body", "code", "where"),
        [
            ({}, "request_invalid", "recipe"),
            (RECIPE, "request_invalid", "recipe"),
            ({"recipe": 5}, "request_invalid", "recipe"),
            ({"recipe": RECIPE, "quue": "fast"}, "unknown_key", "quue"),
            ({"recipe": RECIPE, "webhook": "https://example.com"}, "webhook_refused", "webhook.url"),
            (
                {"recipe": RECIPE, "webhook": {"url": "https://example.com", "events": []}},
                "request_invalid",
                "webhook.events",
            ),
            (
                {"recipe": RECIPE, "webhook": {"url": "https://example.com", "event": 1}},
                "request_invalid",
                "webhook.event",
            ),
            ({"recipe": RECIPE, "webhook": 5}, "request_invalid", "webhook"),
            ({"recipe": RECIPE, "expires_in": 0}, "request_invalid", "expires_in"),
            ({"recipe": RECIPE, "queue": "UPPER"}, "request_invalid", "queue"),
            ({"recipe": RECIPE, "priority": "5"}, "request_invalid", "priority"),
            ({"recipe": RECIPE, "priority": 10**30}, "request_invalid", "priority"),
            ({"recipe": RECIPE, "priority": True}, "request_invalid", "priority"),
            ({"recipe": RECIPE, "labels": {"a": 1}}, "request_invalid", "labels.a"),
            ({"recipe": RECIPE, "labels": {"a": "\x00"}}, "request_invalid", "labels.a"),
            ({"recipe": RECIPE, "labels": {"a": "\ud800"}}, "request_invalid", "labels.a"),
            ({"recipe": {**RECIPE, "name": "\x00"}}, "request_invalid", "name"),
            ({"recipe": RECIPE, "labels": {str(n): "" for n in range(100)}}, "request_invalid", "labels"),
        ],
    )
    def test_is_checked(self, api: ServedApi, body: object, code: str, where: str) -> None:
        response = api.http.post("/merges", content=json.dumps(body), headers=JSON)
        assert problem(response, 422, code)["where"] == where

    def test_a_misspelt_key_is_answered_with_the_nearest_one(self, api: ServedApi) -> None:
        document = problem(post(api, {"recipe": RECIPE, "prioriti": 1}), 422, "unknown_key")
        assert "`priority`" in document["detail"]

    def test_all_problems_of_envelope_and_recipe_come_at_once(self, api: ServedApi) -> None:
        body = {"recipe": {**RECIPE, "models": [], "parameters": {"density": 2}}, "priority": 1000, "weebhook": ""}
        found = {item["where"] for item in post(api, body).json()["problems"]}
        assert found == {"models", "parameters.density", "priority", "weebhook"}

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"[]",
            b"\xff",
            b"",
            b'{"recipe": {}, "recipe": {}}',
            b'{"recipe": NaN}',
            b"[" * 100_000,
            b'{"recipe":' + b'{"a":' * 900 + b"1" + b"}" * 901,
            b'{"priority": ' + b"9" * 5000 + b"}",
        ],
    )
    def test_what_is_not_an_object_of_json_is_refused(self, api: ServedApi, body: bytes) -> None:
        response = api.http.post("/merges", content=body, headers=JSON)
        assert response.status_code == 422
        assert response.json()["code"] in ("request_invalid", "recipe_syntax")

    @pytest.mark.parametrize("body", [b"a: [", b"\xff\xfe", b"- 1", b"", b"a: &x [*x, *x]", b"!!python/object:os.x {}"])
    def test_yaml_that_is_no_recipe_is_refused(self, api: ServedApi, body: bytes) -> None:
        response = api.http.post("/merges", content=body, headers={"content-type": "application/yaml"})
        assert response.status_code == 422
        assert response.json()["fault"] == "user"

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
    def test_another_content_type_is_refused(self, api: ServedApi, kind: str) -> None:
        response = api.http.post("/merges", content=b"{}", headers={"content-type": kind})
        problem(response, 415, "unsupported_media_type")


class TestALargeBody:
    def test_of_100_mb_is_refused_before_it_is_read(self, api: ServedApi) -> None:
        sent = 0

        def body() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(1600):
                sent += 62_500
                yield b" " * 62_500

        headers = {**JSON, "content-length": "100000000"}
        problem(api.http.post("/merges", content=body(), headers=headers), 413, "body_too_large")

    def test_is_answered_before_a_byte_of_it_was_sent(self, api: ServedApi) -> None:
        place = urlsplit(api.url)
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(
                b"POST /merges HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")

    def test_of_unannounced_length_is_refused_while_it_streams(self, api: ServedApi) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chunks = (b" " * 62_500 for _ in range(1600))
        problem(api.http.post("/merges", content=chunks, headers=JSON), 413, "body_too_large")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50_000  # kB; the body is 100 MB

    def test_a_client_that_sends_all_before_it_reads_sees_the_answer(self, api: ServedApi) -> None:
        place = urlsplit(api.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        connection.request("POST", "/merges", body=b" " * 20_000_000, headers=JSON)
        assert connection.getresponse().status == 413
        connection.close()


class TestRouting:
    def test_an_unknown_path_is_a_problem(self, api: ServedApi) -> None:
        problem(api.http.get("/nowhere"), 404, "not_found")

    def test_an_unknown_merge_is_a_problem(self, api: ServedApi) -> None:
        for path in ("", "/events", "/files", "/files/x", "/archive.tar"):
            problem(api.http.get(f"/merges/mrg-unknown{path}"), 404, "not_found")

    def test_an_id_that_cannot_be_one_is_a_problem(self, api: ServedApi) -> None:
        problem(api.http.get("/merges/a%00b"), 422, "request_invalid")

    def test_a_wrong_method_names_the_right_ones(self, api: ServedApi) -> None:
        response = api.http.put("/merges")
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, POST"

    def test_a_path_of_its_own_has_no_methods_of_those_that_look_like_it(self, api: ServedApi) -> None:
        response = api.http.put("/merges/plan")  # /merges/{id} fits it, too
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=x", "cursor=x", "cursor=AAAA", "status=done", "method=a%00", "limit=1000"]
    )
    def test_a_bad_query_is_a_problem(self, api: ServedApi, query: str) -> None:
        problem(api.http.get(f"/merges?{query}"), 422, "request_invalid")

    @pytest.mark.parametrize(
        "text", ["2026-01-01T00:00:00+00:00|a\x00b", "0001-01-01T00:00:00+23:00|a", "9999-12-31T23:59:59-23:00|a", "|"]
    )
    def test_a_forged_cursor_is_a_problem(self, api: ServedApi, text: str) -> None:
        cursor = base64.urlsafe_b64encode(text.encode()).decode()
        problem(api.http.get("/merges", params={"cursor": cursor}), 422, "request_invalid")

    def test_a_sane_request_id_is_kept_and_another_replaced(self, api: ServedApi) -> None:
        assert api.http.get("/healthz", headers={"x-request-id": "build-7"}).headers["x-request-id"] == "build-7"
        assert api.http.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"

    def test_what_nobody_expected_is_internal_and_shows_no_trace(
        self, api: ServedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("app.api.merges.make_plan", lambda *_: 1 / 0)
        response = api.http.post("/merges", json={"recipe": RECIPE}, headers={"x-request-id": "broken-1"})
        problem(response, 500, "internal")
        assert "ZeroDivision" not in response.text
        assert "broken-1" in caplog.text and "ZeroDivisionError" in caplog.text

    def test_a_database_that_is_away_when_the_key_is_looked_up_is_in_the_log(
        self, api: ServedApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def away(*_: object) -> NoReturn:
            raise MergeyardError("database_unavailable", "The database does not answer.")

        monkeypatch.setattr("app.api.callers.Callers.recognise", away)
        response = api.http.get("/merges", headers={"x-request-id": "away-1"})
        problem(response, 503, "database_unavailable")
        assert "database_unavailable: The database does not answer. (request away-1)" in caplog.text
