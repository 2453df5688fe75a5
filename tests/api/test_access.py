"""Who may do what: every route of the OpenAPI document with every kind of key, and what owners see of each other."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.api.examples import EVALUATION, RECIPE, SWEEP
from app.main import create_app
from app.settings import Settings
from tests import files
from tests.api.serving import GuardedApi, ServedApi, problem
from tests.api.test_uploads import parts_of

DOCUMENT = create_app(Settings()).openapi()
ROUTES = {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations}

# What each caller's request to alice's merge is answered with. A new route needs a line here.
CALLERS = ("nobody", "wrong", "expired", "revoked", "reader", "merger", "alice", "bob", "admin")
MODEL = "/api/models/{namespace}/{name}"
NEEDS = {"/audit": "admin", "/metrics": "metrics"}  # elsewhere merge or read
EXPECTED = {
    ("post", "/merges"): (401, 401, 401, 401, 403, 202, 202, 202, 202),
    ("post", "/merges/plan"): (401, 401, 401, 401, 403, 200, 200, 200, 200),
    ("get", "/merges"): (401, 401, 401, 401, 200, 403, 200, 200, 200),
    ("get", "/merges/{id}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("delete", "/merges/{id}"): (401, 401, 401, 401, 403, 204, 204, 404, 204),
    ("get", "/merges/{id}/events"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("post", "/merges/{id}/cancel"): (401, 401, 401, 401, 403, 202, 202, 404, 202),
    ("get", "/merges/{id}/files"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", "/merges/{id}/files/{path}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("head", "/merges/{id}/files/{path}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", "/merges/{id}/archive.tar"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("head", "/merges/{id}/archive.tar"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    **{
        (method, f"/{kind}{ending}"): statuses
        for kind in ("sweeps", "evaluations")
        for (method, ending), statuses in {
            ("post", ""): (401, 401, 401, 401, 403, 202, 202, 202, 202),
            ("get", ""): (401, 401, 401, 401, 200, 403, 200, 200, 200),
            ("get", "/{id}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
            ("delete", "/{id}"): (401, 401, 401, 401, 403, 204, 204, 404, 204),
            ("get", "/{id}/events"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
            ("get", "/{id}/webhooks"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
            ("post", "/{id}/cancel"): (401, 401, 401, 401, 403, 202, 202, 404, 202),
        }.items()
    },
    ("post", "/sweeps/{id}/merges"): (401, 401, 401, 401, 403, 202, 202, 404, 202),
    ("get", "/aliases"): (401, 401, 401, 401, 200, 403, 200, 200, 200),
    ("get", "/aliases/{alias}"): (401, 401, 401, 401, 200, 403, 200, 404, 404),
    ("put", "/aliases/{alias}"): (401, 401, 401, 401, 403, 201, 201, 404, 404),
    ("delete", "/aliases/{alias}"): (401, 401, 401, 401, 403, 204, 204, 404, 404),
    ("get", f"{MODEL}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", f"{MODEL}/revision/{{revision}}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", f"{MODEL}/tree/{{revision}}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", f"{MODEL}/tree/{{revision}}/{{path}}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", "/{namespace}/{name}/resolve/{revision}/{path}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("head", "/{namespace}/{name}/resolve/{revision}/{path}"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("post", "/uploads"): (401, 401, 401, 401, 403, 201, 200, 201, 201),
    ("get", "/sources"): (401, 401, 401, 401, 200, 403, 200, 200, 200),
    ("get", "/webhooks"): (401, 401, 401, 401, 403, 200, 200, 200, 200),
    ("get", "/merges/{id}/webhooks"): (401, 401, 401, 401, 200, 403, 200, 404, 200),
    ("get", "/queues"): (401, 401, 401, 401, 200, 403, 200, 200, 200),
    ("get", "/workers"): (401, 401, 401, 401, 200, 403, 200, 200, 200),
    ("get", "/audit"): (401, 401, 401, 401, 403, 403, 403, 403, 200),
    ("get", "/metrics"): (401, 401, 401, 401, 403, 403, 403, 403, 200),
    ("post", "/session"): (401, 401, 401, 401, 201, 201, 201, 201, 201),
    ("get", "/session"): (401, 401, 401, 401, 200, 200, 200, 200, 200),
    ("delete", "/session"): (401, 401, 401, 401, 204, 204, 204, 204, 204),
    ("get", "/healthz"): (200,) * 9,
    ("get", "/readyz"): (200,) * 9,
}
SCORED = {"sweeps": SWEEP, "evaluations": EVALUATION}
CODES = {"nobody": "key_required", "wrong": "key_invalid", "expired": "key_expired", "revoked": "key_revoked"}


def test_every_route_has_a_line() -> None:
    assert set(EXPECTED) == ROUTES


@pytest.mark.parametrize(("method", "path"), sorted(EXPECTED))
def test_a_route_lets_in_whom_it_should(guarded: GuardedApi, method: str, path: str, tmp_path: Path) -> None:
    answers = [send(guarded, caller, method, path, tmp_path) for caller in CALLERS]
    assert tuple(answer.status_code for answer in answers) == EXPECTED[method, path]
    if method == "head":
        return
    for caller, answer in zip(CALLERS, answers, strict=True):
        if answer.status_code == 401:
            problem(answer, 401, CODES[caller])
            invalid = 'error="invalid_token"' in answer.headers["www-authenticate"]
            assert answer.headers["www-authenticate"].startswith('Bearer realm="mergeyard"')
            assert invalid == (caller != "nobody")
        elif answer.status_code == 403:
            scope = NEEDS.get(path, "merge" if caller == "reader" else "read")
            problem(answer, 403, f"scope_{scope}_required")
            assert f'error="insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]
        elif answer.status_code == 404:
            absent = guarded.send(caller, method, filled(path, "mrg-nowhere"), **body(method, path, "mrg-nowhere"))
            assert comparable(answer) == comparable(absent)


def test_a_scrapers_key_opens_the_figures_and_nothing_else(guarded: GuardedApi, tmp_path: Path) -> None:
    everybodys = {route for route, statuses in EXPECTED.items() if set(statuses) == {200} or route[1] == "/session"}
    for method, path in sorted(ROUTES - everybodys):
        answer = send(guarded, "scraper", method, path, tmp_path)
        assert answer.status_code == (200 if path == "/metrics" else 403), path


def send(guarded: GuardedApi, caller: str, method: str, path: str, folder: Path) -> Any:
    """The caller's request to a fresh merge (or sweep, or evaluation) of alice's."""
    if (kind := path.split("/")[1]) in SCORED and "{id}" in path:
        made = guarded.send("alice", "post", f"/{kind}", json=SCORED[kind]).json()["id"]
        if method == "delete":
            assert guarded.send("alice", "post", f"/{kind}/{made}/cancel").status_code == 202
        return guarded.send(caller, method, filled(path, made), **body(method, path, made))
    if path.endswith("/cancel"):
        merge = guarded.served.queued(owner="alice").id
    else:
        merge = guarded.served.published({"config.json": b"{}", "folder/a.json": b"{}"}, owner="alice").id
    if path == "/aliases/{alias}" and method != "put":
        assert guarded.send("alice", "put", f"/aliases/{merge}", json={"merge": merge}).status_code == 201
    options = body(method, path, merge)
    if path == "/uploads":
        if not (adapter := folder / "adapter").exists():
            files.write_adapter(adapter, files.lora_tensors(seed=31))
        options = {"files": parts_of(adapter)}
    return guarded.send(caller, method, filled(path, merge), **options)


def body(method: str, path: str, merge: str) -> dict[str, Any]:
    if method == "post" and path in ("/merges", "/merges/plan"):
        return {"json": {"recipe": RECIPE}}
    if method == "post" and path.removeprefix("/") in SCORED:
        return {"json": SCORED[path.removeprefix("/")]}
    if path == "/sweeps/{id}/merges":
        return {"json": {"point": 0}}
    return {"json": {"merge": merge}} if method == "put" else {}


def filled(path: str, merge: str) -> str:
    """The path of a merge, of a repository with the merge in it, or of an alias that has the merge's name."""
    file = "folder" if "/tree/" in path else "config.json"
    parts = {"namespace": "merges", "revision": "main", "path": file}
    for name in ("id", "alias", "name"):
        parts[name] = merge
    for name, value in parts.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def comparable(answer: Any) -> dict[str, Any]:
    return {name: value for name, value in answer.json().items() if name not in ("instance", "request_id")}


def test_a_path_that_nobody_thought_of_is_closed(guarded: GuardedApi) -> None:
    problem(guarded.send("nobody", "get", "/nowhere"), 401, "key_required")
    problem(guarded.send("alice", "get", "/nowhere"), 404, "not_found")
    problem(guarded.send("nobody", "get", "/healthz/"), 401, "key_required")


def test_the_apis_description_is_open(guarded: GuardedApi) -> None:
    for path in ("/docs", "/openapi.json"):
        assert guarded.send("nobody", "get", path).status_code == 200


@pytest.mark.parametrize("header", ["bearer {}", "BEARER  {}"])
def test_the_schemes_name_is_read_in_any_case(guarded: GuardedApi, header: str) -> None:
    headers = {"Authorization": header.format(guarded.keys["alice"])}
    assert guarded.served.http.get("/merges", headers=headers).status_code == 200


@pytest.mark.parametrize("header", ["{}", "Basic {}", "Bearer", "Bearer {} {}"])
def test_another_scheme_is_no_key(guarded: GuardedApi, header: str) -> None:
    headers = {"Authorization": header.format(*[guarded.keys["alice"]] * 2)}
    assert guarded.served.http.get("/merges", headers=headers).status_code == 401


def test_a_key_is_asked_for_before_a_body(guarded: GuardedApi) -> None:
    place = urlsplit(guarded.served.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(b"POST /merges HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nx")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


class TestOwners:
    def test_lists_show_ones_own_and_an_admin_everything(self, guarded: GuardedApi) -> None:
        body = {"recipe": RECIPE}
        ids = {owner: guarded.send(owner, "post", "/merges", json=body).json()["id"] for owner in ("alice", "bob")}

        def listed(caller: str) -> set[str]:
            items = guarded.send(caller, "get", "/merges").json()["items"]
            return {item["id"] for item in items}

        assert listed("alice") == listed("reader") == {ids["alice"]}
        assert listed("bob") == {ids["bob"]}
        assert listed("admin") == set(ids.values())

    def test_the_same_idempotency_key_makes_a_merge_an_owner(self, guarded: GuardedApi) -> None:
        headers = {"Idempotency-Key": "nightly"}
        made = {
            caller: guarded.send(caller, "post", "/merges", json={"recipe": RECIPE}, headers=headers).json()["id"]
            for caller in ("alice", "bob", "merger")
        }
        assert made["alice"] == made["merger"] != made["bob"]

    def test_anothers_merge_is_no_source(self, guarded: GuardedApi, tmp_path: Path) -> None:
        model = files.write_model(tmp_path / "model")
        contents = {path.name: path.read_bytes() for path in model.iterdir()}
        merge = guarded.served.published(contents, owner="alice").id
        recipe = {"merge_method": "linear", "models": [{"model": f"merge:{merge}"}]}
        absent = {"merge_method": "linear", "models": [{"model": "merge:mrg-nowhere"}]}
        for caller in ("bob", "admin"):
            theirs = guarded.send(caller, "post", "/merges/plan", json={"recipe": recipe})
            nobodys = guarded.send(caller, "post", "/merges/plan", json={"recipe": absent})
            problem(theirs, 422, "source_not_found")
            assert theirs.json()["detail"] == nobodys.json()["detail"].replace("mrg-nowhere", merge)
        mine = guarded.send("alice", "post", "/merges/plan", json={"recipe": recipe})
        assert mine.status_code == 200, mine.text

    def test_an_upload_is_there_for_whoever_sent_it(self, guarded: GuardedApi, tmp_path: Path) -> None:
        adapter = files.write_adapter(tmp_path / "adapter", files.lora_tensors(seed=32))
        reference = guarded.send("alice", "post", "/uploads", files=parts_of(adapter)).json()["reference"]
        recipe = {**RECIPE, "models": [{"adapter": reference}]}

        def planned(caller: str) -> int:
            return guarded.send(caller, "post", "/merges/plan", json={"recipe": recipe}).status_code

        def listed(caller: str) -> bool:
            items = guarded.send(caller, "get", "/sources").json()["items"]
            return reference in [item["reference"] for item in items]

        assert (planned("alice"), listed("alice")) == (200, True)
        for caller in ("bob", "admin"):
            assert (planned(caller), listed(caller)) == (422, False)
        sent = guarded.send("bob", "post", "/uploads", files=parts_of(adapter))
        assert (sent.status_code, sent.json()["reference"]) == (201, reference)
        assert (planned("bob"), listed("bob")) == (200, True)
        assert planned("admin") == 422
        assert len(list(guarded.served.settings.uploads.iterdir())) == 1


class TestWhileItRuns:
    def test_the_first_key_closes_the_service_and_a_revoked_one_ends_at_once(self, fresh_api: ServedApi) -> None:
        from app.records.key import Caller, Scope
        from app.records.keys import Keys

        keys, operator = Keys(fresh_api.jobs.database), Caller(owner="cli:tests")
        fresh_api.submit()
        assert fresh_api.http.get("/merges").status_code == 200
        made = keys.create(owner="local", scopes=[Scope.READ], by=operator)
        problem(fresh_api.http.get("/merges"), 401, "key_required")
        headers = {"Authorization": f"Bearer {made.text}"}
        assert len(fresh_api.http.get("/merges", headers=headers).json()["items"]) == 1
        keys.revoke(made.key.id, by=operator)
        problem(fresh_api.http.get("/merges", headers=headers), 401, "key_revoked")
        problem(fresh_api.http.get("/merges"), 401, "key_required")


class TestWithoutKeys:
    def test_a_key_that_nobody_made_is_passed_over(self, api: ServedApi) -> None:
        assert api.http.get("/merges", headers={"Authorization": "Bearer hf_abc"}).status_code == 200

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.0.0.5", "", "127.0.0.1.evil.example", "["])
    def test_another_name_than_this_machines_is_refused(self, api: ServedApi, host: str) -> None:
        for method in ("GET", "POST"):
            problem(api.http.request(method, "/merges", headers={"Host": host}), 401, "key_required")

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "app.localhost"])
    def test_every_name_of_this_machine_is_taken(self, api: ServedApi, host: str) -> None:
        assert api.http.get("/merges", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:3000"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    def test_a_page_of_another_site_changes_nothing(self, api: ServedApi, headers: dict[str, str]) -> None:
        for method, path in (("POST", "/merges"), ("DELETE", "/merges/x"), ("POST", "/uploads")):
            problem(api.http.request(method, path, headers=headers), 403, "origin_refused")

    def test_our_own_pages_do(self, api: ServedApi) -> None:
        headers = {"Origin": api.url, "Sec-Fetch-Site": "same-origin"}
        assert api.http.post("/merges/plan", json={"recipe": RECIPE}, headers=headers).status_code == 200
