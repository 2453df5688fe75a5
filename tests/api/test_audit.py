"""GET /audit: who did what, with the request that did it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.api.examples import RECIPE
from app.api.failures import ROWS_A_MINUTE
from app.records.audit import Audit
from app.records.database import Database
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests import files
from tests.api.serving import GuardedApi, serving
from tests.api.test_uploads import parts_of


def audit(guarded: GuardedApi, **query: Any) -> list[dict[str, Any]]:
    answer = guarded.send("admin", "get", "/audit", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def test_every_action_is_there_with_its_key_and_request(guarded: GuardedApi, tmp_path: Path) -> None:
    adapter = files.write_adapter(tmp_path / "adapter", files.lora_tensors(seed=41))
    done = guarded.served.published({"config.json": b"{}"}, owner="alice").id
    file = f"/merges/{done}/files/config.json"
    sent = guarded.send("alice", "post", "/merges", json={"recipe": RECIPE}, headers={"X-Request-Id": "mine-1"})
    merge = sent.json()["id"]
    for _ in range(2):
        guarded.send("alice", "post", f"/merges/{merge}/cancel")
    reference = guarded.send("alice", "post", "/uploads", files=parts_of(adapter)).json()["reference"]
    guarded.send("alice", "head", file)
    etag = guarded.send("alice", "get", file).headers["etag"]
    guarded.send("alice", "get", file, headers={"If-None-Match": etag})
    guarded.send("alice", "get", file, headers={"Range": "bytes=1-"})
    guarded.send("alice", "get", f"/merges/{done}/archive.tar")
    guarded.send("bob", "get", file)
    guarded.send("alice", "delete", f"/merges/{done}")
    found = audit(guarded, owner="alice")
    assert [(entry["action"], entry["subject"], entry["data"].get("file")) for entry in found] == [
        ("submitted", merge, None),
        ("cancelled", merge, None),
        ("uploaded", reference, None),
        ("downloaded", done, "config.json"),
        ("downloaded", done, "config.json"),
        ("downloaded", done, "archive.tar"),
        ("deleted", done, None),
    ]
    assert found[0]["request_id"] == "mine-1" == sent.headers["x-request-id"]
    assert {entry["key_id"] for entry in found} == {guarded.keys["alice"][4:16]}
    assert found[4]["data"]["range"] == "bytes=1-"
    assert audit(guarded, owner="bob") == []


def test_it_is_read_from_where_one_left_off(guarded: GuardedApi) -> None:
    everything = audit(guarded)
    assert {entry["action"] for entry in everything} == {"key_created", "key_revoked"}
    assert {entry["owner"] for entry in everything} == {"cli:tests"}
    page = guarded.send("admin", "get", "/audit", params={"limit": 2}).json()
    assert page["items"] == everything[:2] and page["after"] == everything[1]["id"]
    assert audit(guarded, after=page["after"]) == everything[2:]
    assert [entry["action"] for entry in audit(guarded, action="key_revoked")] == ["key_revoked"]
    assert guarded.send("admin", "get", "/audit", params={"after": 10**6}).json() == {"items": [], "after": 10**6}


def test_a_repeated_submission_is_one_entry(guarded: GuardedApi) -> None:
    for _ in range(2):
        guarded.send("alice", "post", "/merges", json={"recipe": RECIPE}, headers={"Idempotency-Key": "once"})
    assert len(audit(guarded, action="submitted")) == 1


def test_failed_authentications_are_counted_in_few_rows(guarded: GuardedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    minute = [1000.0]
    monkeypatch.setattr("app.api.failures.time.monotonic", lambda: minute[0])
    for caller in ("nobody", "revoked", "expired", *["wrong"] * 20):
        guarded.send(caller, "get", "/merges", headers={"X-Request-Id": f"from-{caller}"})
    minute[0] += 61
    guarded.send("wrong", "get", "/merges")
    found = audit(guarded, action="authentication_failed")
    assert len(found) == ROWS_A_MINUTE + 1
    assert [entry["data"]["code"] for entry in found[:3]] == ["key_revoked", "key_expired", "key_invalid"]
    assert sum(entry["data"]["count"] for entry in found) == 23
    assert found[0]["request_id"] == "from-revoked" and found[0]["data"]["address"] == "127.0.0.1"
    assert found[0]["key_id"] == guarded.keys["revoked"][4:16]
    assert guarded.keys["wrong"][17:] not in str(found)


def test_what_is_counted_is_written_when_the_process_ends(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    Keys(database).create(owner="alice", scopes=list(Scope), by=Caller(owner="cli:tests"))
    settings = Settings(data_dir=tmp_path, database_url=database_url, rate_failures=0, janitor_seconds=3600)
    with serving(settings) as api:
        for _ in range(ROWS_A_MINUTE * 3):
            assert api.http.get("/merges", headers={"Authorization": "Bearer nonsense"}).status_code == 401
    found = Audit(database).list(action="authentication_failed")
    assert sum(entry.data["count"] for entry in found) == ROWS_A_MINUTE * 3
    assert len(found) <= 2 * ROWS_A_MINUTE + 1  # the minute may have turned between
