"""The hub's contract as its clients were seen to rely on it; the clients themselves are in tests/hub."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from app.artifacts.manifest import MANIFEST_NAME
from app.records.job import Job
from tests.api.serving import GuardedApi, ServedApi, problem

FILES = {"model.safetensors": bytes(1000), "config.json": b"{}", "1_Pooling/config.json": b"[]", "LICENSE": b"mine"}


@pytest.fixture(scope="module")
def job(api: ServedApi) -> Job:
    return api.published(FILES)


def commit(job: Job) -> str:
    assert job.artifact is not None
    return str(job.artifact["manifest_sha256"])[:40]


def missed(response: httpx.Response, error: str, sha: str | None = None) -> None:
    """A miss as clients know it: anything else they take for a broken network."""
    assert response.status_code == 404
    assert response.headers["x-error-code"] == error
    assert response.headers["x-error-message"]
    assert response.headers.get("x-repo-commit") == sha
    if response.request.method == "GET":
        problem(response, 404, "not_found")


class TestAModel:
    @pytest.mark.parametrize("revision", ["", "/revision/main", "/revision/{sha}"])
    def test_is_the_artifact_at_its_commit(self, api: ServedApi, job: Job, revision: str) -> None:
        found = api.http.get(f"/api/models/merges/{job.id}{revision.format(sha=commit(job))}").json()
        assert (found["id"], found["sha"], found["private"]) == (f"merges/{job.id}", commit(job), False)
        names = [sibling["rfilename"] for sibling in found["siblings"]]
        assert sorted(names) == sorted([*FILES, MANIFEST_NAME])
        digests = {sibling["rfilename"]: sibling["lfs"]["sha256"] for sibling in found["siblings"]}
        assert digests["LICENSE"] == hashlib.sha256(b"mine").hexdigest()

    @pytest.mark.parametrize(
        "path",
        [
            "/api/models/merges/mrg-nowhere",
            "/api/models/merges/%2e%2e",
            "/api/models/merges/%00",
            "/api/models/aliases/nothing",
            "/api/models/meta-llama/Llama-3-8B",
            "/api/models/meta-llama/Llama-3-8B/tree/main",
            "/api/models/gpt2",
            "/api/models/gpt2/revision/main",
            "/api/models/gpt2/tree/main",
            "/gpt2/resolve/main/config.json",
            "/meta-llama/Llama-3-8B/resolve/main/config.json",
            "/merges/mrg-nowhere/resolve/main/config.json",
        ],
    )
    def test_that_is_none_of_ours_is_not_found(self, api: ServedApi, path: str) -> None:
        missed(api.http.get(path), "RepoNotFound")

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_does_not_exist_before_its_merge_has_succeeded(self, api: ServedApi, method: str) -> None:
        unfinished = api.queued().id
        response = api.http.request(method, f"/merges/{unfinished}/resolve/main/config.json")
        missed(response, "RepoNotFound")
        assert "queued" in response.headers["x-error-message"]

    @pytest.mark.parametrize("revision", ["refs/pr/1", "0" * 40, "Main", "%00", "v1"])
    def test_has_no_other_revision(self, api: ServedApi, job: Job, revision: str) -> None:
        missed(api.http.get(f"/api/models/merges/{job.id}/revision/{revision}"), "RevisionNotFound")
        missed(api.http.get(f"/api/models/merges/{job.id}/tree/{revision}"), "RevisionNotFound")
        missed(api.http.head(f"/merges/{job.id}/resolve/{revision}/config.json"), "RevisionNotFound")


class TestATree:
    def paths(self, response: httpx.Response) -> list[str]:
        assert response.status_code == 200, response.text
        return [entry["path"] for entry in response.json()]

    def test_has_folders_or_all_that_is_in_them(self, api: ServedApi, job: Job) -> None:
        tree = f"/api/models/merges/{job.id}/tree/main"
        top = ["1_Pooling", "LICENSE", "config.json", MANIFEST_NAME, "model.safetensors"]
        assert self.paths(api.http.get(tree)) == top
        assert self.paths(api.http.get(tree, params={"recursive": "False"})) == top
        everything = self.paths(api.http.get(tree, params={"recursive": "True"}))
        assert everything == ["1_Pooling", "1_Pooling/config.json", *top[1:]]
        assert self.paths(api.http.get(f"{tree}/1_Pooling")) == ["1_Pooling/config.json"]
        missed(api.http.get(f"{tree}/2_Pooling"), "EntryNotFound", commit(job))

    def test_describes_files_as_the_hub_does(self, api: ServedApi, job: Job) -> None:
        entries = api.http.get(f"/api/models/merges/{job.id}/tree/main").json()
        licence = next(entry for entry in entries if entry["path"] == "LICENSE")
        digest = hashlib.sha256(b"mine").hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 4\n".encode()
        assert licence == {
            "type": "file",
            "path": "LICENSE",
            "size": 4,
            "oid": hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(),
            "lfs": {"oid": digest, "size": 4, "pointerSize": len(pointer)},
        }
        assert "lfs" not in entries[0] and entries[0]["type"] == "directory"

    def test_comes_in_pages_of_one_commit(self, fresh_api: ServedApi) -> None:
        old, new = (fresh_api.published(files) for files in (FILES, {"config.json": b"new"}))
        fresh_api.http.put("/aliases/production", json={"merge": old.id})
        page = fresh_api.http.get("/api/models/aliases/production/tree/main?recursive=true&limit=2")
        found = self.paths(page)
        fresh_api.http.put("/aliases/production", json={"merge": new.id})
        while "next" in page.links:
            page = fresh_api.http.get(page.links["next"]["url"])
            assert len(page.json()) <= 2
            found += self.paths(page)
        assert found == sorted([*FILES, "1_Pooling", MANIFEST_NAME])


class TestAFile:
    def test_comes_with_the_headers_that_clients_cache_by(self, api: ServedApi, job: Job) -> None:
        path = f"/merges/{job.id}/resolve/{commit(job)}/model.safetensors"
        for method in ("HEAD", "GET"):
            response = api.http.request(method, path, headers={"Accept-Encoding": "gzip, deflate"})
            assert response.status_code == 200
            assert response.headers["etag"] == f'"{hashlib.sha256(bytes(1000)).hexdigest()}"'
            assert response.headers["content-length"] == "1000"
            assert response.headers["accept-ranges"] == "bytes"
            assert response.headers["x-repo-commit"] == commit(job)
            assert "content-encoding" not in response.headers

    def test_comes_in_part(self, api: ServedApi, job: Job) -> None:
        path = f"/merges/{job.id}/resolve/main/LICENSE"
        response = api.http.get(path, headers={"Range": "bytes=1-"})
        assert (response.status_code, response.content) == (206, b"ine")
        assert response.headers["content-range"] == "bytes 1-3/4"
        assert response.headers["x-repo-commit"] == commit(job)
        assert api.http.get(path, headers={"Range": "bytes=4-"}).status_code == 416

    def test_may_be_in_a_folder(self, api: ServedApi, job: Job) -> None:
        assert api.http.get(f"/merges/{job.id}/resolve/main/1_Pooling/config.json").content == b"[]"

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("name", ["adapter_config.json", "1_Pooling", "%2e%2e/config.json", "%00"])
    def test_that_is_missing_says_at_which_commit(self, api: ServedApi, job: Job, method: str, name: str) -> None:
        missed(
            api.http.request(method, f"/merges/{job.id}/resolve/main/{name}"),
            "EntryNotFound",
            commit(job),
        )

    def test_that_is_downloaded_is_in_the_audit(self, guarded: GuardedApi) -> None:
        merge = guarded.served.published(FILES, owner="alice").id
        for method in ("head", "get"):
            guarded.send("alice", method, f"/merges/{merge}/resolve/main/LICENSE")
        found = guarded.send("admin", "get", "/audit", params={"action": "downloaded"}).json()["items"]
        assert [(entry["subject"], entry["data"]["file"]) for entry in found] == [(merge, "LICENSE")]


class TestAnAlias:
    def test_follows_and_keeps_what_it_has_pointed_to(self, fresh_api: ServedApi) -> None:
        old, new, never = (fresh_api.published({"config.json": b"%d" % number}) for number in range(3))

        def config(revision: str) -> httpx.Response:
            return fresh_api.http.get(f"/aliases/production/resolve/{revision}/config.json")

        fresh_api.http.put("/aliases/production", json={"merge": old.id})
        assert config("main").content == b"0"
        fresh_api.http.put("/aliases/production", json={"merge": new.id})
        assert (config("main").content, config("main").headers["x-repo-commit"]) == (b"1", commit(new))
        assert (config(commit(old)).content, config(commit(old)).headers["x-repo-commit"]) == (b"0", commit(old))
        model = fresh_api.http.get(f"/api/models/aliases/production/revision/{commit(old)}").json()
        assert (model["id"], model["sha"]) == ("aliases/production", commit(old))
        missed(config(commit(never)), "RevisionNotFound")
        fresh_api.http.delete(f"/merges/{old.id}")
        missed(config(commit(old)), "RevisionNotFound")
        assert config("main").content == b"1"

    def test_has_a_commit_as_long_as_one_merge_of_it_is_there(self, fresh_api: ServedApi) -> None:
        twins = [fresh_api.published({"config.json": b"{}"}) for _ in range(2)]
        assert commit(twins[0]) == commit(twins[1])
        for twin in twins:
            fresh_api.http.put("/aliases/production", json={"merge": twin.id})
        other = fresh_api.published({"config.json": b"other"})
        fresh_api.http.put("/aliases/production", json={"merge": other.id})
        assert fresh_api.http.delete(f"/merges/{twins[1].id}").status_code == 204
        found = fresh_api.http.get(f"/aliases/production/resolve/{commit(twins[1])}/config.json")
        assert found.content == b"{}"

    def test_that_is_anothers_is_not_found(self, guarded: GuardedApi) -> None:
        merge = guarded.served.published(FILES, owner="alice").id
        guarded.send("alice", "put", "/aliases/production", json={"merge": merge})
        for path in (f"merges/{merge}", "aliases/production"):
            assert guarded.send("reader", "get", f"/api/models/{path}").json()["private"]
            missed(guarded.send("bob", "get", f"/api/models/{path}"), "RepoNotFound")
            missed(guarded.send("bob", "head", f"/{path}/resolve/main/LICENSE"), "RepoNotFound")
