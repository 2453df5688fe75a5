"""The OpenAPI document: every example in it runs as it stands, and every answer has the shape it promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from app.api.examples import EVALUATION, SWEEP
from app.main import create_app
from app.settings import Settings
from tests import files
from tests.api.curl import run_curl
from tests.api.serving import PROBLEM, ServedApi
from tests.api.test_uploads import parts_of

DOCUMENT = create_app(Settings()).openapi()


def body_examples() -> list[Any]:
    """(method, path, media type, value) of every documented request body."""
    return [
        pytest.param(method, path, media_type, example["value"], id=f"{method} {path} {name}")
        for path, operations in DOCUMENT["paths"].items()
        for method, operation in operations.items()
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items()
        for name, example in content.get("examples", {}).items()
    ]


def problems_of(  # noqa: PLR0911 (one kind of schema a return)
    value: Any, schema: dict[str, Any], where: str = "$"
) -> list[str]:
    """Where a value is not what a schema of the kind pydantic writes says."""
    if "$ref" in schema:
        return problems_of(value, DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], where)
    if "anyOf" in schema:
        found = [problems_of(value, one, where) for one in schema["anyOf"]]
        return min(found, key=len)
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r}"]
    kinds: dict[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    if not isinstance(value, kinds.get(schema.get("type", ""), object)):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if isinstance(value, list):
        return [found for item in value for found in problems_of(item, schema.get("items", {}), f"{where}[]")]
    if isinstance(value, dict) and "properties" in schema:
        strange = [f"{where}: {key} is not documented" for key in value if key not in schema["properties"]]
        missing = [f"{where}: {key} is missing" for key in schema.get("required", []) if key not in value]
        inside = [
            found
            for key, item in value.items()
            for found in problems_of(item, schema["properties"].get(key, {}), f"{where}.{key}")
        ]
        return strange + missing + inside
    return []


@pytest.mark.parametrize(("method", "path", "media_type", "value"), body_examples())
def test_a_documented_request_runs(api: ServedApi, method: str, path: str, media_type: str, value: Any) -> None:
    documented = path
    if path == "/aliases/{alias}":
        value = {"merge": api.published({"config.json": b"{}"}).id}
    if "{id}" in path:
        path_id = api.http.post("/sweeps", json=SWEEP).raise_for_status().json()["id"]
        path = path.replace("{id}", path_id)
    sent = {"json": value} if media_type == "application/json" else {"content": value}
    response = api.http.request(
        method, path.replace("{alias}", "documented"), headers={"content-type": media_type}, **sent
    )
    assert response.is_success, response.text
    declared = DOCUMENT["paths"][documented][method]["responses"][str(response.status_code)]
    assert problems_of(response.json(), declared["content"]["application/json"]["schema"]) == []


def test_there_are_examples_of_every_way_to_send_a_recipe() -> None:
    recipes = [example for example in body_examples() if example.values[1].startswith("/merges")]
    assert len(recipes) == 6


def test_every_path_of_the_issue_is_there() -> None:
    assert {path: sorted(operations) for path, operations in DOCUMENT["paths"].items()} == {
        "/merges": ["get", "post"],
        "/merges/plan": ["post"],
        "/merges/{id}": ["delete", "get"],
        "/merges/{id}/events": ["get"],
        "/merges/{id}/cancel": ["post"],
        "/merges/{id}/files": ["get"],
        "/merges/{id}/files/{path}": ["get", "head"],
        "/merges/{id}/archive.tar": ["get", "head"],
        **{
            f"/{kind}{ending}": methods
            for kind in ("sweeps", "evaluations")
            for ending, methods in {
                "": ["get", "post"],
                "/{id}": ["delete", "get"],
                "/{id}/events": ["get"],
                "/{id}/cancel": ["post"],
                "/{id}/webhooks": ["get"],
            }.items()
        },
        "/sweeps/{id}/merges": ["post"],
        "/aliases": ["get"],
        "/aliases/{alias}": ["delete", "get", "put"],
        "/api/models/{namespace}/{name}": ["get"],
        "/api/models/{namespace}/{name}/revision/{revision}": ["get"],
        "/api/models/{namespace}/{name}/tree/{revision}": ["get"],
        "/api/models/{namespace}/{name}/tree/{revision}/{path}": ["get"],
        "/{namespace}/{name}/resolve/{revision}/{path}": ["get", "head"],
        "/uploads": ["post"],
        "/sources": ["get"],
        "/queues": ["get"],
        "/webhooks": ["get"],
        "/merges/{id}/webhooks": ["get"],
        "/workers": ["get"],
        "/session": ["delete", "get", "post"],
        "/audit": ["get"],
        "/metrics": ["get"],
        "/healthz": ["get"],
        "/readyz": ["get"],
    }


def test_every_answer_has_its_documented_shape(api: ServedApi) -> None:
    merge = api.published({"config.json": b"{}", "folder/config.json": b"{}"})
    api.http.put("/aliases/shaped", json={"merge": merge.id})
    made = {
        kind: api.http.post(f"/{kind}", json=body).raise_for_status().json()["id"]
        for kind, body in (("sweeps", SWEEP), ("evaluations", EVALUATION))
    }
    model = "/api/models/{namespace}/{name}"
    for path, template in {
        "/merges": "/merges",
        f"/merges/{merge.id}": "/merges/{id}",
        f"/merges/{merge.id}/events": "/merges/{id}/events",
        f"/merges/{merge.id}/files": "/merges/{id}/files",
        **{
            f"/{kind}{ending.format(job_id)}": f"/{kind}{ending.format('{id}')}"
            for kind, job_id in made.items()
            for ending in ("", "/{}", "/{}/events", "/{}/webhooks")
        },
        "/aliases": "/aliases",
        "/aliases/shaped": "/aliases/{alias}",
        f"/api/models/merges/{merge.id}": model,
        f"/api/models/merges/{merge.id}/revision/main": f"{model}/revision/{{revision}}",
        f"/api/models/merges/{merge.id}/tree/main?recursive=true": f"{model}/tree/{{revision}}",
        f"/api/models/merges/{merge.id}/tree/main/folder": f"{model}/tree/{{revision}}/{{path}}",
        "/sources": "/sources",
        "/queues": "/queues",
        "/webhooks": "/webhooks",
        f"/merges/{merge.id}/webhooks": "/merges/{id}/webhooks",
        "/workers": "/workers",
        "/session": "/session",
        "/audit": "/audit",
        "/healthz": "/healthz",
        "/readyz": "/readyz",
    }.items():
        declared = DOCUMENT["paths"][template]["get"]["responses"]["200"]
        found = api.http.get(path)
        assert problems_of(found.json(), declared["content"]["application/json"]["schema"]) == [], path


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize(
    "asked", [{}, {"range": "bytes=0-1"}, {"if-none-match": "*"}], ids=["all", "range", "unchanged"]
)
@pytest.mark.parametrize("name", ["files/config.json", "files/a.md", "files/a.txt", "files/a.bin", "archive.tar"])
def test_a_download_has_its_documented_type_and_headers(
    api: ServedApi, name: str, asked: dict[str, str], method: str
) -> None:
    merge = api.published({name.removeprefix("files/"): b"bytes"})
    found = api.http.request(method, f"/merges/{merge.id}/{name}", headers=asked)
    template = "/merges/{id}/archive.tar" if name == "archive.tar" else "/merges/{id}/files/{path}"
    declared = DOCUMENT["paths"][template][method]["responses"][str(found.status_code)]
    if found.status_code != 304:
        assert found.headers["content-type"].partition(";")[0] in declared["content"]
    assert [header for header, meaning in declared["headers"].items() if meaning["required"]] == [
        header for header in declared["headers"] if header in found.headers
    ]


def test_an_unchanged_merge_is_documented(api: ServedApi) -> None:
    merge = api.queued()
    unchanged = api.http.get(f"/merges/{merge.id}", headers={"if-none-match": "*"})
    assert unchanged.status_code == 304
    declared = DOCUMENT["paths"]["/merges/{id}"]["get"]["responses"]["304"]
    assert {name for name in declared["headers"] if name in unchanged.headers} == {"ETag", "Retry-After"}


def test_the_answer_to_an_upload_is_documented_the_first_time_and_again(api: ServedApi, tmp_path: Path) -> None:
    adapter = files.write_adapter(tmp_path / "adapter", files.lora_tensors(seed=412))
    for status in (201, 200):
        answer = api.http.post("/uploads", files=parts_of(adapter))
        assert answer.status_code == status
        declared = DOCUMENT["paths"]["/uploads"]["post"]["responses"][str(status)]
        assert problems_of(answer.json(), declared["content"]["application/json"]["schema"]) == []


def test_whatever_needs_a_key_may_be_refused_or_unavailable() -> None:
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            if "security" in operation:
                assert {"401", "403", "429", "503"} <= operation["responses"].keys()
                assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
                assert "Retry-After" in operation["responses"]["429"]["headers"]


def test_every_link_leads_to_an_operation_by_all_that_its_path_needs() -> None:
    operations = {
        operation["operationId"]: operation
        for operations in DOCUMENT["paths"].values()
        for operation in operations.values()
    }
    followed = set()
    for operation in operations.values():
        for answer in operation["responses"].values():
            for link in answer.get("links", {}).values():
                parameters = {one["name"]: one["in"] for one in operations[link["operationId"]].get("parameters", [])}
                assert link["parameters"].keys() <= parameters.keys()
                assert {name for name, place in parameters.items() if place == "path"} <= link["parameters"].keys()
                followed.add(link["operationId"])
    assert followed == {
        name for path, of_path in DOCUMENT["paths"].items() if "{id}" in path for name in ids_of(of_path)
    }


def test_no_parameter_is_said_to_be_null() -> None:
    schemas = {
        parameter["name"]: parameter["schema"]
        for operations in DOCUMENT["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", ())
    }
    assert schemas["last-event-id"]["type"] == "integer"
    assert schemas["status"]["type"] == "array"
    assert not [name for name, schema in schemas.items() if {"type": "null"} in schema.get("anyOf", ())]


def ids_of(operations: dict[str, Any]) -> set[str]:
    return {operation["operationId"] for operation in operations.values()}


def test_an_error_has_its_documented_shape(api: ServedApi) -> None:
    schema = {"$ref": "#/components/schemas/ProblemDocument"}
    assert problems_of(api.http.get("/nowhere").json(), schema) == []
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")):
                    assert list(answer["content"]) == [PROBLEM]


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(DOCUMENT))
    assert "#/components/schemas/ProblemDocument" in found
    assert {ref for ref in found if ref.rsplit("/", 1)[1] not in DOCUMENT["components"]["schemas"]} == set()
    assert all(ref.startswith("#/components/schemas/") for ref in found)


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for operations in DOCUMENT["paths"].values() for operation in operations.values()]
    assert len(ids) == len(set(ids))


def test_the_page_shows_every_operation_and_loads_nothing_from_elsewhere(api: ServedApi) -> None:
    assert api.http.get("/openapi.json").json()["info"]["title"] == "Mergeyard"
    page = api.http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert f'<section id="{operation["operationId"]}">' in page.text
    elsewhere = [url for url in re.findall(r"https?://[^\s<\"']+", page.text) if not url.startswith(api.url)]
    assert elsewhere == []


def test_the_commands_on_the_page_run(api: ServedApi) -> None:
    merge = api.published({"config.json": b"{}", "folder/config.json": b"{}"})
    api.http.put("/aliases/shown", json={"merge": merge.id})
    made = {
        kind: api.http.post(f"/{kind}", json=body).raise_for_status().json()["id"]
        for kind, body in (("sweeps", SWEEP), ("evaluations", EVALUATION))
    }
    page = unescape(api.http.get("/docs").text)
    commands = re.findall(r"<pre>(curl .*?)</pre>", page, re.DOTALL)
    assert len(commands) == 54
    for shown in commands:
        command = re.sub(r"/(sweeps|evaluations)/\$ID", lambda found: f"/{found[1]}/{made[found[1]]}", shown)
        if "-F" in command or "-X" in command:  # files that are not here, and what ends the merge
            continue
        file = "folder" if "/tree/" in command else "config.json"
        response = run_curl(command.replace("$ID", merge.id).replace("$FILE", file).replace("$ALIAS", "shown"))
        assert response.is_success, command
