"""``mergeyard keys``, and the service that is not to be reached by others before there is one."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.records.audit import Audit
from app.records.database import Database
from mergeyard import ApiError, Client
from tests.cli.commands import MERGEYARD, environment, mergeyard


@pytest.fixture
def variables(sqlite_url: str, tmp_path: Path) -> dict[str, str]:
    return {"MERGEYARD_DATABASE_URL": sqlite_url, "MERGEYARD_DATA_DIR": str(tmp_path / "data")}


def test_a_key_is_made_shown_once_listed_and_revoked(variables: dict[str, str], sqlite_url: str) -> None:
    ran = mergeyard("keys", "create", "--owner", "search", "--note", "nightly", **variables)
    assert ran.code == 0 and ran.out.startswith("mrg_") and ran.out.count("\n") == 1
    key, key_id = ran.out.strip(), ran.out[4:16]
    assert key_id in ran.err and "search" in ran.err and key not in ran.err
    listed = mergeyard("keys", "list", **variables)
    assert key_id in listed.out and "merge,read" in listed.out and "nightly" in listed.out and key not in listed.out
    document = mergeyard("keys", "list", "--json", **variables).json["items"][0]
    assert (document["id"], document["owner"], document["state"]) == (key_id, "search", "active")
    assert document["scopes"] == ["merge", "read"] and document["last_used_at"] is None
    assert mergeyard("keys", "revoke", key_id, **variables).code == 0
    assert mergeyard("keys", "list", "--json", **variables).json["items"][0]["state"] == "revoked"
    database = Database(sqlite_url)
    entries = Audit(database).list()
    database.close()
    assert [(entry.action, entry.subject) for entry in entries] == [("key_created", key_id), ("key_revoked", key_id)]
    assert all(entry.owner.startswith("cli:") and "@" in entry.owner for entry in entries)


def test_a_key_may_have_a_quota_which_its_successor_keeps(variables: dict[str, str]) -> None:
    old = mergeyard("keys", "create", "--owner", "search", "--quota", "2TB", "--json", **variables).json
    new = mergeyard("keys", "create", "--replaces", old["id"], "--json", **variables).json
    assert old["quota_bytes"] == new["quota_bytes"] == 2 * 10**12
    assert mergeyard("keys", "create", "--owner", "search", "--json", **variables).json["quota_bytes"] is None
    assert mergeyard("keys", "create", "--owner", "search", "--quota", "much", **variables).code == 2


def test_a_key_replaces_another(variables: dict[str, str]) -> None:
    options = ("--owner", "search", "--scope", "admin", "--expires-in", "30d", "--json")
    old = mergeyard("keys", "create", *options, **variables).json
    new = mergeyard("keys", "create", "--replaces", old["id"], "--grace", "0s", "--json", **variables).json
    assert (new["owner"], new["scopes"], new["replaces"]) == ("search", ["admin"], old["id"])
    assert new["key"] != old["key"] and new["expires_at"] > old["expires_at"]
    states = {key["id"]: key["state"] for key in mergeyard("keys", "list", "--json", **variables).json["items"]}
    assert states == {old["id"]: "expired", new["id"]: "active"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("create",),
        ("create", "--owner", "a b"),
        ("create", "--owner", "a", "--grace", "1h"),
        ("create", "--owner", "a", "--expires-in", "soon"),
        ("create", "--owner", "a", "--expires-in", "9999999d"),
        ("create", "--owner", "a", "--scope", "write"),
        ("create", "--owner", "a", "--replaces", "0123456789ab"),
        ("create", "--replaces", "0123456789ab"),
        ("revoke", "0123456789ab"),
    ],
)
def test_what_makes_no_sense_is_exit_code_2(variables: dict[str, str], arguments: tuple[str, ...]) -> None:
    assert mergeyard("keys", *arguments, **variables).code == 2
    assert mergeyard("keys", "list", "--json", **variables).json == {"items": []}


def test_a_database_that_is_not_migrated_says_so(tmp_path: Path) -> None:
    ran = mergeyard("keys", "list", MERGEYARD_DATA_DIR=str(tmp_path))
    assert ran.code == 1 and "mergeyard migrate" in ran.err


@pytest.mark.parametrize("command", ["api", "up"])
def test_without_keys_a_service_that_others_could_reach_does_not_start(variables: dict[str, str], command: str) -> None:
    ran = mergeyard(command, **variables, MERGEYARD_HOST="0.0.0.0", MERGEYARD_PORT="0")
    assert ran.code == 2
    assert "mergeyard keys create" in ran.err and "0.0.0.0" in ran.err


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def api(variables: dict[str, str], port: int, request: pytest.FixtureRequest) -> Iterator[str]:
    """``mergeyard api`` on an address; the text it wrote is in the file ``log``."""
    own = {**variables, "MERGEYARD_HOST": request.param, "MERGEYARD_PORT": str(port)}
    log = Path(variables["MERGEYARD_DATA_DIR"]).with_name("log")
    with log.open("w") as stream:
        process = subprocess.Popen([*MERGEYARD, "api"], stderr=stream, stdout=stream, env=environment(**own))
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("api", ["127.0.0.1"], indirect=True)
def test_without_keys_the_service_says_that_it_is_open(api: str, variables: dict[str, str]) -> None:
    assert "no API keys" in Path(variables["MERGEYARD_DATA_DIR"]).with_name("log").read_text()
    assert list(Client(api, "").list()) == []


class TestWithAKey:
    @pytest.fixture
    def key(self, variables: dict[str, str]) -> str:
        return mergeyard("keys", "create", "--owner", "search", **variables).out.strip()

    @pytest.mark.parametrize("api", ["0.0.0.0"], indirect=True)
    def test_it_may_be_reached_by_others_and_the_client_takes_the_key_from_the_environment(
        self, key: str, api: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ApiError) as caught:
            Client(api, "").page()
        assert (caught.value.code, caught.value.status) == ("key_required", 401)
        assert list(Client(api, key).list()) == []
        monkeypatch.setenv("MERGEYARD_API_KEY", key)
        assert list(Client(api).list()) == []
        assert mergeyard("list", "--json", MERGEYARD_URL=api, MERGEYARD_API_KEY=key).json["items"] == []
        ran = mergeyard("list", MERGEYARD_URL=api, MERGEYARD_API_KEY=key[:17] + "0" * 32)
        assert ran.code == 2 and "key_invalid" in ran.err
