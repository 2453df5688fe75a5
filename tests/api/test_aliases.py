"""Aliases: what they point to, what they keep, and whose they are."""

from __future__ import annotations

import pytest

from app.records.job import Job
from tests.api.serving import GuardedApi, ServedApi, problem


@pytest.fixture
def jobs(fresh_api: ServedApi) -> list[Job]:
    return [fresh_api.published({"config.json": b"%d" % number}) for number in range(3)]


def point(api: ServedApi, job: Job, status: int = 200, alias: str = "production") -> dict[str, object]:
    answer = api.http.put(f"/aliases/{alias}", json={"merge": job.id})
    assert answer.status_code == status, answer.text
    found: dict[str, object] = answer.json()
    return found


def history(api: ServedApi, **query: int) -> list[str]:
    return [move["merge"] for move in api.http.get("/aliases/production", params=query).json()["history"]]


def commit(job: Job) -> str:
    assert job.artifact is not None
    return str(job.artifact["manifest_sha256"])[:40]


class TestPointing:
    def test_makes_an_alias_and_then_moves_it(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        first, second, _ = jobs
        made = point(fresh_api, first, 201)
        assert (made["merge"], made["commit"], made["repo"]) == (first.id, commit(first), "aliases/production")
        moved = point(fresh_api, second)
        assert moved["merge"] == second.id and moved["created_at"] == made["created_at"]
        assert fresh_api.http.get("/aliases").json()["items"] == [moved]

    def test_again_changes_nothing(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        made = point(fresh_api, jobs[0], 201)
        assert point(fresh_api, jobs[0]) == made
        assert history(fresh_api) == [jobs[0].id]

    def test_is_remembered_the_newest_first(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        first, second, third = jobs
        point(fresh_api, first, 201)
        for job in (second, third, first):
            point(fresh_api, job)
        assert history(fresh_api) == [first.id, third.id, second.id, first.id]
        assert history(fresh_api, limit=2) == [first.id, third.id]

    def test_needs_an_artifact(self, fresh_api: ServedApi) -> None:
        answer = fresh_api.http.put("/aliases/production", json={"merge": fresh_api.queued().id})
        assert "queued" in problem(answer, 409, "conflict")["detail"]
        problem(fresh_api.http.get("/aliases/production"), 404, "not_found")

    def test_needs_a_merge_that_is_there(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        fresh_api.http.delete(f"/merges/{jobs[0].id}")
        for merge in (jobs[0].id, "mrg-nowhere"):
            problem(fresh_api.http.put("/aliases/production", json={"merge": merge}), 404, "not_found")

    @pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a.", "ü", "x" * 97, "%00", "a b", "model.git"])
    def test_takes_only_names_that_hub_clients_take(self, api: ServedApi, name: str) -> None:
        problem(api.http.put(f"/aliases/{name}", json={"merge": "mrg-x"}), 422, "request_invalid")

    @pytest.mark.parametrize("body", [{}, {"merge": 1}, {"merge": "a\x00"}, {"merge": "mrg-x", "more": 1}, []])
    def test_takes_only_a_merge(self, api: ServedApi, body: object) -> None:
        problem(api.http.put("/aliases/production", json=body), 422, "request_invalid")


class TestDeleting:
    def test_a_merge_that_an_alias_points_to_is_refused(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        first, second, _ = jobs
        point(fresh_api, first, 201)
        point(fresh_api, first, 201, alias="also")
        refused = fresh_api.http.delete(f"/merges/{first.id}")
        assert "also, production" in problem(refused, 409, "merge_in_use")["detail"]
        assert fresh_api.http.get(f"/merges/{first.id}/files/config.json").content == b"0"
        point(fresh_api, second)
        problem(fresh_api.http.delete(f"/merges/{first.id}"), 409, "merge_in_use")
        assert fresh_api.http.delete("/aliases/also").status_code == 204
        assert fresh_api.http.delete(f"/merges/{first.id}").status_code == 204
        assert history(fresh_api) == [second.id, first.id], "what the alias has left stays in its history"

    def test_an_alias_leaves_its_merges(self, fresh_api: ServedApi, jobs: list[Job]) -> None:
        point(fresh_api, jobs[0], 201)
        assert fresh_api.http.delete("/aliases/production").status_code == 204
        problem(fresh_api.http.delete("/aliases/production"), 404, "not_found")
        assert fresh_api.http.get(f"/merges/{jobs[0].id}").json()["status"] == "succeeded"
        point(fresh_api, jobs[1], 201)
        assert history(fresh_api) == [jobs[1].id], "a new alias of the name begins anew"


class TestOwners:
    def test_have_names_of_their_own(self, guarded: GuardedApi) -> None:
        for owner in ("alice", "bob"):
            merge = guarded.served.published({"config.json": owner.encode()}, owner=owner).id
            assert guarded.send(owner, "put", "/aliases/production", json={"merge": merge}).status_code == 201
            file = guarded.send(owner, "get", "/aliases/production/resolve/main/config.json")
            assert file.content == owner.encode()
        assert guarded.send("admin", "get", "/aliases").json()["items"] == []

    def test_an_admin_cannot_lead_to_anothers_merge(self, guarded: GuardedApi) -> None:
        merge = guarded.served.published({"config.json": b"{}"}, owner="alice").id
        for caller in ("admin", "bob"):
            problem(guarded.send(caller, "put", "/aliases/mine", json={"merge": merge}), 404, "not_found")

    def test_the_audit_says_who_pointed_where(self, guarded: GuardedApi) -> None:
        merges = [guarded.served.published({"config.json": b"%d" % number}, owner="alice").id for number in range(2)]
        for merge in (*merges, merges[1]):
            guarded.send("alice", "put", "/aliases/production", json={"merge": merge})
        key = guarded.keys["alice"][4:16]
        moves = guarded.send("alice", "get", "/aliases/production").json()["history"]
        assert [(move["merge"], move["key_id"]) for move in moves] == [(merges[1], key), (merges[0], key)]
        guarded.send("alice", "delete", "/aliases/production")
        found = guarded.send("admin", "get", "/audit", params={"owner": "alice"}).json()["items"]
        assert [(entry["action"], entry["subject"], entry["data"]) for entry in found] == [
            ("alias_pointed", merges[0], {"alias": "production", "before": None}),
            ("alias_pointed", merges[1], {"alias": "production", "before": merges[0]}),
            ("alias_deleted", merges[1], {"alias": "production"}),
        ]
