"""Reuse from end to end, on both databases: an API and attempts on real files, and what makes a merge another one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.planning import fingerprint
from app.records.key import Caller, Scope
from app.records.keys import Keys
from tests import tiny
from tests.api.serving import ServedApi, problem, serving
from tests.worker.attempts import attempt, failing, place_in
from tests.worker.yard import SHARDED, Yard, open_yard
from worker.job import Ending


@pytest.fixture
def yard(tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, database_url: str) -> Iterator[Yard]:
    held = {"database_url": database_url, "lease_seconds": 60.0}  # leases are not what these are about
    with open_yard(tmp_path, tiny_models, broker_url, queue, tidy=False, **held) as opened:
        yield opened


@pytest.fixture
def api(yard: Yard) -> Iterator[ServedApi]:
    with serving(yard.settings) as served:
        yield served


def submit(api: ServedApi, envelope: dict[str, Any] | None = None, key: str = "", **changes: Any) -> dict[str, Any]:
    """A merge of the tiny model as a client submits it; ``changes`` are the recipe's."""
    body = {"recipe": tiny.recipe(**changes), "queue": api.settings.queue, **(envelope or {})}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = api.http.post("/merges", json=body, headers=headers)
    assert response.status_code == 202, response.text
    return response.json()


def merged(yard: Yard, api: ServedApi, *arguments: Any, **changes: Any) -> dict[str, Any]:
    """Submitted, and worked on in this process."""
    merge = submit(api, *arguments, **changes)
    assert attempt(place_in(yard), yard.jobs.get(merge["id"])) is Ending.PUBLISHED
    return merge


def test_the_same_merge_again_is_answered_with_the_same_files_at_once(yard: Yard, api: ServedApi) -> None:
    first = merged(yard, api)
    assert not first["reused"]
    response = api.http.post("/merges", json={"recipe": tiny.recipe(), "labels": {"a": "b"}, "expires_in": 3600})
    second = response.json()
    assert response.status_code == 202 and "retry-after" not in response.headers
    assert (second["status"], second["reused"], second["progress"]["fraction"]) == ("succeeded", True, 1.0)
    assert second["labels"] == {"a": "b"} and second["expires_at"]
    listings = [api.http.get(f"/merges/{merge['id']}/files").json() for merge in (first, second)]
    assert listings[0]["manifest_sha256"] == listings[1]["manifest_sha256"]
    assert api.http.get(listings[1]["items"][0]["url"]).content == api.http.get(listings[0]["items"][0]["url"]).content
    kinds = [event["type"] for event in api.http.get(second["urls"]["events"]).json()["items"]]
    assert kinds == ["submitted", "reused", "succeeded"]


def test_deleting_the_merge_that_made_the_files_leaves_them_to_the_other(yard: Yard, api: ServedApi) -> None:
    first, second = merged(yard, api), submit(api)
    assert api.http.delete(first["urls"]["self"]).status_code == 204
    assert api.http.get(first["urls"]["self"]).status_code == 404
    archive = api.http.get(second["urls"]["archive"])
    assert archive.status_code == 200 and len(archive.content) == int(archive.headers["content-length"])
    assert api.http.delete(second["urls"]["self"]).status_code == 204
    assert list(yard.store.keys(first["id"])) == [], "with the last of them"
    assert submit(api)["status"] == "queued"


CHANGES: dict[str, dict[str, Any]] = {
    "density": {"parameters": {"density": 0.25, "weight": 1.0}},
    "out_dtype": {"out_dtype": "float16"},
    "shards": SHARDED,
    "name": {"name": "another"},
    "seed": {"merge_method": "dare_ties", "parameters": {"density": 0.5, "weight": 1.0, "seed": 7}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_files_depend_on_makes_it_another_merge(yard: Yard, api: ServedApi, change: str) -> None:
    seeded = {"parameters": {"density": 0.5, "weight": 1.0, "seed": 6}}
    before = {"merge_method": "dare_ties", **seeded} if change == "seed" else {}
    merged(yard, api, **before)
    assert submit(api, **CHANGES[change])["status"] == "queued"
    assert submit(api, **before)["reused"], "and the first is still there"


def test_force_merges_anew(yard: Yard, api: ServedApi) -> None:
    first = merged(yard, api)
    forced = submit(api, {"force": True})
    assert (forced["status"], forced["reused"]) == ("queued", False)
    assert attempt(place_in(yard), yard.jobs.get(forced["id"])) is Ending.PUBLISHED
    assert submit(api)["reused"] and first["fingerprint"] == forced["fingerprint"]


def test_another_version_of_the_engine_merges_anew(yard: Yard, api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(yard, api)
    monkeypatch.setattr(fingerprint, "ENGINE_VERSION", "next")
    assert submit(api)["status"] == "queued"


def weights(yard: Yard) -> Path:
    (path,) = (yard.settings.roots[0] / "sql").glob("*.safetensors")
    return path


def other_values(path: Path) -> bytes:
    """Weights of the same header and size, and other values."""
    content = path.read_bytes()
    return content[:-64] + bytes(byte ^ 1 for byte in content[-64:])


def overwrite(path: Path) -> None:
    path.write_bytes(other_values(path))


def replace(path: Path) -> None:
    draft = path.with_name("draft")
    draft.write_bytes(other_values(path))
    draft.replace(path)


def swap_folder(path: Path) -> None:
    """Another folder, whose files nothing happens to now, takes the name of this one."""
    path.parent.rename(path.parent.with_name("before"))
    path.parent.with_name("after").rename(path.parent)


@pytest.mark.parametrize("change", [overwrite, replace, swap_folder])
def test_a_source_of_other_bytes_is_seen_though_header_size_and_time_are_the_same(
    yard: Yard, api: ServedApi, change: Any
) -> None:
    path = weights(yard)
    status = path.stat()
    after = path.parent.with_name("after")
    after.mkdir()
    for file in path.parent.iterdir():
        (after / file.name).write_bytes(other_values(file) if file == path else file.read_bytes())
        os.utime(after / file.name, ns=(status.st_atime_ns, file.stat().st_mtime_ns))
    first = merged(yard, api)
    assert submit(api)["reused"]
    change(path)
    if path.stat().st_mtime_ns != status.st_mtime_ns:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = submit(api)
    assert (other["fingerprint"], other["status"]) == (first["fingerprint"], "queued"), "the plan cannot tell"


def test_what_was_replaced_while_it_was_merged_is_not_reused(yard: Yard, api: ServedApi) -> None:
    path = weights(yard)
    status = path.stat()
    content = path.read_bytes()

    def touch() -> None:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    merge = submit(api)
    assert attempt(place_in(yard), yard.jobs.get(merge["id"]), touch, count=1) is Ending.PUBLISHED
    assert submit(api)["status"] == "queued"


def test_what_an_earlier_attempt_made_of_files_that_may_be_others_now_is_not_reused(yard: Yard, api: ServedApi) -> None:
    place = place_in(yard)
    merge = submit(api, **SHARDED)
    assert attempt(place, yard.jobs.get(merge["id"]), failing(ZeroDivisionError())) is Ending.FAILED
    assert yard.jobs.shards(merge["id"])
    assert attempt(place, yard.jobs.get(merge["id"])) is Ending.PUBLISHED
    assert submit(api, **SHARDED)["status"] == "queued"


def test_files_that_are_damaged_are_not_reused(yard: Yard, api: ServedApi) -> None:
    first = merged(yard, api)
    artifact = yard.jobs.get(first["id"]).artifact
    assert artifact is not None
    yard.store.path(artifact["files"][0]["key"]).write_bytes(b"")
    assert submit(api)["status"] == "queued"


def test_owners_reuse_their_own_alone(yard: Yard, api: ServedApi) -> None:
    keys = Keys(yard.jobs.database)
    alice, bob = (
        keys.create(owner=owner, scopes=(Scope.READ, Scope.MERGE), by=Caller(owner="cli:tests")).text
        for owner in ("alice", "bob")
    )
    merged(yard, api, None, alice)
    assert submit(api, key=bob)["status"] == "queued"
    assert submit(api, key=alice)["reused"]


def test_a_merge_of_merges_is_reused_and_keeps_what_it_reads(yard: Yard, api: ServedApi) -> None:
    first = merged(yard, api)
    recipe = {"merge_method": "linear", "models": [{"model": "models:tiny-llama"}, {"model": f"merge:{first['id']}"}]}
    envelope = {"recipe": {**recipe, "parameters": {"weight": 0.5}}}
    second = submit(api, envelope)
    problem(api.http.delete(first["urls"]["self"]), 409, "merge_in_use")
    assert attempt(place_in(yard), yard.jobs.get(second["id"])) is Ending.PUBLISHED
    assert submit(api, envelope)["reused"]
    assert api.http.delete(first["urls"]["self"]).status_code == 204


def test_the_janitor_deletes_what_has_expired(yard: Yard, api: ServedApi) -> None:
    merge = merged(yard, api, {"expires_in": 1})
    yard.until(lambda: api.http.get(merge["urls"]["self"]).status_code == 404)
    yard.until(lambda: not list(yard.store.keys(merge["id"])))
