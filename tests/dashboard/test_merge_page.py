"""The page of a merge: what it tells in each state, and what can be done with it there, on both databases."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import closing
from html import unescape
from typing import Any

import httpx
import pytest

from app.errors import MergeyardError
from app.records.job import Stage
from tests.api.serving import GuardedApi, ServedApi

RECIPE = {
    "base_model": "models:smollm2-135m-instruct",
    "merge_method": "ties",
    "models": [{"adapter": "models:adapters/sql"}, {"adapter": "models:adapters/json"}],
    "parameters": {"density": 0.5},
}
ENTRY = {
    "sources": [0, 1],
    "trimmed": [0.25, 0.75],
    "sign_conflict": 0.125,
    "source_norms": [1.0, 2.0],
    "merged_norm": 3.0,
    "parameters": 4096,
    "retained_energy": None,
}
STATISTICS = {f"model.layers.{layer}.mlp.up_proj.weight": ENTRY for layer in range(3)}


def text_of(response: httpx.Response, status: int = 200) -> str:
    """What the page says, without its tags."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", response.text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def recipe(**changes: Any) -> dict[str, Any]:
    return {"recipe": {}, "resolved": {**RECIPE, **changes}}


def published(api: ServedApi, statistics: Mapping[str, Any] = STATISTICS, **changes: Any) -> str:
    """A succeeded merge of the example recipe, its manifest with these statistics."""
    job = api.running(**{"recipe": RECIPE, "resolved": RECIPE, **changes})
    token = job.lease_token or ""
    api.jobs.set_stage(job.id, token, Stage.MERGING)
    manifest = api.store_file(job, "mergeyard.json", json.dumps({"statistics": statistics}).encode())
    weights = api.store_file(job, "model.safetensors", b"weights")
    api.jobs.set_stage(job.id, token, Stage.PUBLISHING)
    artifact = {
        "manifest_sha256": manifest["sha256"],
        "manifest_key": manifest["key"],
        "size": manifest["size"] + weights["size"],
        "files": [manifest, weights],
    }
    return api.jobs.publish(job.id, token, artifact).id


class TestStates:
    def test_queued(self, api: ServedApi) -> None:
        job = api.queued(recipe=RECIPE, resolved=RECIPE, queue="gpu-a", priority=7, labels={"team": "search & <b>"})
        response = api.http.get(f"/ui/merges/{job.id}")
        text = text_of(response)
        assert job.id in text
        for told in ("queued", "gpu-a, priority 7", "team: search & <b>", "0 of 3", "waiting"):
            assert told in text
        assert "<b>" not in response.text
        assert f'action="/ui/merges/{job.id}/cancel"' in response.text
        assert "/delete" not in response.text
        assert '<noscript><meta http-equiv="refresh"' in response.text
        assert f'data-events="/merges/{job.id}/events"' in response.text

    def test_running(self, api: ServedApi) -> None:
        job = api.running(recipe=RECIPE, resolved=RECIPE, total_bytes=4_000_000)
        token = job.lease_token or ""
        api.jobs.set_stage(job.id, token, Stage.MERGING)
        api.jobs.heartbeat(job.id, token, lease_seconds=3600, progress_bytes=1_000_000)
        response = api.http.get(f"/ui/merges/{job.id}")
        text = text_of(response)
        assert "1.0 MB of 4.0 MB ( 25.0 % )" in text
        assert re.search(r"[\d.]+ [kMG]?B/s", text)
        assert re.search(r"about .* left", text)
        assert 'value="0.2500"' in response.text
        assert "goes on" in text

    def test_succeeded(self, api: ServedApi) -> None:
        job_id = published(api, pinned=True)
        response = api.http.get(f"/ui/merges/{job_id}")
        text = text_of(response)
        for told in (
            "succeeded",
            "pinned",
            "publishing",
            f"vllm serve merges/{job_id}",
            f"hf download merges/{job_id}",
        ):
            assert told in text
        assert f'from_pretrained("merges/{job_id}"' in text
        assert f"curl -f {api.url}/merges/{job_id}/archive.tar" in text
        assert f'href="/merges/{job_id}/files/model.safetensors"' in response.text
        assert f'href="/merges/{job_id}/archive.tar"' in response.text
        for file in api.jobs.get(job_id).artifact["files"]:  # type: ignore[index]
            assert file["sha256"] in text
        assert "data-events" not in response.text
        assert "http-equiv" not in response.text
        assert f'action="/ui/merges/{job_id}/rerun"' in response.text

    def test_failed_says_why_and_what_to_do(self, api: ServedApi) -> None:
        job = api.running(recipe=RECIPE, resolved=RECIPE, max_attempts=2)
        error = MergeyardError("disk_full", "The store has no room left.")
        api.jobs.fail(job.id, job.lease_token or "", error, retry=True)
        again = api.jobs.claim(job.id, lease_seconds=60, worker="gpu-2")
        assert again is not None
        api.jobs.fail(
            job.id, again.lease_token or "", MergeyardError("out_of_memory", "Too little memory."), retry=True
        )
        text = text_of(api.http.get(f"/ui/merges/{job.id}"))
        assert "There is not enough memory out_of_memory" in text
        assert "disk_full The store has no room left." in text, "why the first attempt failed"
        assert "gpu-2" in text
        assert "The service is the reason, not the recipe: run it again." in text

    def test_a_users_own_mistake_is_not_the_services(self, api: ServedApi) -> None:
        job = api.running(recipe=RECIPE, resolved=RECIPE)
        error = MergeyardError("source_not_finite", "models:adapters/sql holds NaN.", where="models[0]")
        api.jobs.fail(job.id, job.lease_token or "", error, retry=False)
        text = text_of(api.http.get(f"/ui/merges/{job.id}"))
        assert "models:adapters/sql holds NaN. ( models[0] )" in text
        assert "change it and submit again" in text
        assert "run it again" not in text

    def test_cancelled(self, api: ServedApi) -> None:
        job = api.queued(recipe=RECIPE, resolved=RECIPE)
        api.jobs.request_cancel(job.id)
        response = api.http.get(f"/ui/merges/{job.id}")
        assert "cancelled" in text_of(response)
        assert "/cancel" not in response.text

    def test_a_result_that_was_there(self, api: ServedApi) -> None:
        job_id = published(api)
        again, _ = api.jobs.submit(api.new(recipe=RECIPE, resolved=RECIPE), reuse=job_id)
        response = api.http.get(f"/ui/merges/{again.id}")
        text = text_of(response)
        assert "with the result of an equal merge" in text
        assert f"merge:{job_id}" in text
        assert 'id="heatmap-data"' in response.text, "its manifest is that of the one that made it"


def test_the_recipe_can_be_submitted_as_it_is_shown(api: ServedApi) -> None:
    job_id = published(api)
    page = api.http.get(f"/ui/merges/{job_id}").text
    shown = re.search(r'<code id="recipe-sent">(.*?)</code>', page, re.DOTALL)
    assert shown is not None
    yaml = unescape(shown[1])
    sent = api.http.post("/merges/plan", content=yaml, headers={"content-type": "application/yaml"})
    assert sent.status_code == 200, sent.text


class TestDifference:
    def test_to_another_merge(self, api: ServedApi) -> None:
        before = published(api, **recipe(parameters={"density": 0.3}))
        after = published(api)
        response = api.http.get(f"/ui/merges/{after}", params={"compare": before})
        assert "<del>" in response.text
        text = text_of(response)
        assert "− density: 0.3" in text
        assert "+ density: 0.5" in text

    def test_to_an_equal_one(self, api: ServedApi) -> None:
        one, other = published(api), published(api)
        assert "The resolved recipes are equal." in text_of(api.http.get(f"/ui/merges/{one}?compare={other}"))

    def test_to_nothing(self, api: ServedApi) -> None:
        job_id = published(api)
        text = text_of(api.http.get(f"/ui/merges/{job_id}?compare=<mrg-0>"))
        assert "Its owner has no merge with this id." in text

    def test_the_last_few_are_offered(self, fresh_api: ServedApi) -> None:
        jobs = [fresh_api.queued(recipe=RECIPE, resolved=RECIPE) for _ in range(3)]
        page = fresh_api.http.get(f"/ui/merges/{jobs[0].id}").text
        assert f"?compare={jobs[0].id}" not in page
        assert all(f"?compare={job.id}" in page for job in jobs[1:])


class TestHeatmap:
    def test_its_numbers_are_in_the_page(self, api: ServedApi) -> None:
        statistics = {**STATISTICS, "model.embed_tokens.weight": {**ENTRY, "sign_conflict": None}}
        response = api.http.get(f"/ui/merges/{published(api, statistics)}")
        block = re.search(r'<script type="application/json" id="heatmap-data">(.*?)</script>', response.text, re.DOTALL)
        assert block is not None
        (stack,) = json.loads(block[1])["stacks"]
        assert (stack["name"], stack["layers"], stack["modules"]) == ("model.layers", [0, 1, 2], ["mlp.up_proj"])
        assert (stack["sign_conflict"], stack["trimmed"]) == ([[0.125] * 3], [[0.5] * 3])
        assert stack["shown"][0][0] == (
            "sign conflict 12.5 %<br>share trimmed 50.0 %<br>norm of the change 3<br>4,096 parameters"
        )
        text = text_of(response)
        assert "Layer mlp.up_proj 0 12.5 % 1 12.5 % 2 12.5 %" in text, "and in a table"
        assert "model.embed_tokens 4,096 — 50.0 % 3" in text

    def test_only_its_page_takes_plotlys_styles(self, api: ServedApi) -> None:
        with_one = api.http.get(f"/ui/merges/{published(api)}").headers["content-security-policy"]
        without = api.http.get(f"/ui/merges/{published(api, {})}").headers["content-security-policy"]
        assert "unsafe-hashes" in with_one
        assert "sha256-" in with_one
        assert "unsafe-hashes" not in without
        for policy in (with_one, without):
            assert "script-src 'self';" in policy
            assert "unsafe-inline" not in policy and "unsafe-eval" not in policy

    def test_plotly_comes_from_its_package(self, api: ServedApi) -> None:
        page = api.http.get(f"/ui/merges/{published(api)}").text
        address = re.search(r'data-plotly="([^"]*)"', page)
        assert address is not None
        script = api.http.get(address[1])
        assert script.status_code == 200
        assert script.text.startswith("/**\n* plotly.js v")
        assert "immutable" in script.headers["cache-control"]

    def test_a_manifest_that_cannot_be_read_leaves_the_rest(self, api: ServedApi) -> None:
        job_id = published(api)
        api.store.delete(api.jobs.get(job_id).artifact["manifest_key"])  # type: ignore[index]
        response = api.http.get(f"/ui/merges/{job_id}")
        assert "vllm serve" in text_of(response)
        assert "heatmap-data" not in response.text


class TestActions:
    def test_cancel(self, api: ServedApi) -> None:
        job = api.queued(recipe=RECIPE, resolved=RECIPE)
        answer = api.http.post(f"/ui/merges/{job.id}/cancel", data={"x": "y"})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/merges/{job.id}")
        assert api.jobs.get(job.id).status == "cancelled"

    def test_what_is_refused_is_said_on_the_page(self, api: ServedApi) -> None:
        job_id = published(api)
        answer = api.http.post(f"/ui/merges/{job_id}/cancel", data={"x": "y"})
        assert "The merge has already succeeded; it can no longer be cancelled." in text_of(answer, 409)

    def test_run_again_is_a_new_merge_of_the_same(self, fresh_api: ServedApi) -> None:
        first = fresh_api.submit(labels={"team": "search"}, queue="gpu-a", priority=3, pinned=True, expires_in=3600)
        fresh_api.jobs.request_cancel(first["id"])
        answer = fresh_api.http.post(f"/ui/merges/{first['id']}/rerun", data={"x": "y"})
        assert answer.status_code == 303, answer.text
        again = fresh_api.http.get(f"/merges/{answer.headers['location'].rpartition('/')[2]}").json()
        assert again["id"] != first["id"]
        assert again["status"] == "queued"
        for name in ("recipe", "resolved", "fingerprint", "labels", "queue", "priority", "pinned", "owner"):
            assert again[name] == first[name]
        assert fresh_api.jobs.get(again["id"]).expires_in == 3600

    @pytest.mark.parametrize(("force", "status"), [("", "succeeded"), ("true", "queued")])
    def test_run_again_takes_an_equal_result_unless_forced(self, fresh_api: ServedApi, force: str, status: str) -> None:
        from app.planning.planner import make_plan
        from app.planning.reuse import reuse_key
        from app.recipe import parse_recipe
        from app.records.owned import resolver_of
        from app.sources.hub.hub import Hub, HubSettings

        first = fresh_api.submit()
        job = fresh_api.jobs.claim(first["id"], lease_seconds=60)
        assert job is not None
        api = fresh_api
        with closing(Hub(HubSettings.of(api.settings))) as hub:
            resolver = resolver_of("local", settings=api.settings, jobs=api.jobs, store=api.store, hub=hub)
            key = reuse_key(make_plan(parse_recipe(job.resolved), resolver))
        if key is None:
            pytest.skip("this file system keeps change times in whole seconds, so nothing is reused on it")
        manifest = fresh_api.store_file(job, "mergeyard.json", b"{}")
        artifact = {
            "manifest_sha256": manifest["sha256"],
            "manifest_key": manifest["key"],
            "size": manifest["size"],
            "files": [manifest],
        }
        fresh_api.jobs.publish(job.id, job.lease_token or "", artifact, reuse_key=key)
        answer = fresh_api.http.post(f"/ui/merges/{job.id}/rerun", data={"force": force} if force else {"x": "y"})
        assert answer.status_code == 303, answer.text
        again = fresh_api.jobs.get(answer.headers["location"].rpartition("/")[2])
        assert again.status == status

    def test_what_stands_against_running_it_again_is_said_with_its_place(self, api: ServedApi) -> None:
        broken = {**RECIPE, "models": [{"adapter": "models:adapters/gone"}, {"adapter": "models:adapters/sql"}]}
        job = api.queued(recipe=broken, resolved=broken)
        api.jobs.request_cancel(job.id)
        text = text_of(api.http.post(f"/ui/merges/{job.id}/rerun", data={"x": "y"}), 422)
        assert "source_not_found" in text
        assert "models[0].adapter" in text

    def test_delete(self, api: ServedApi) -> None:
        job_id = published(api)
        answer = api.http.post(f"/ui/merges/{job_id}/delete", data={"x": "y"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/merges")
        assert api.http.get(f"/ui/merges/{job_id}").status_code == 404
        assert list(api.store.keys(job_id)) == []

    def test_an_alias_is_pointed_and_holds_the_merge(self, api: ServedApi) -> None:
        job_id = published(api)
        answer = api.http.post(f"/ui/merges/{job_id}/alias", data={"name": "page-test"})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/merges/{job_id}")
        assert "aliases/page-test" in text_of(api.http.get(f"/ui/merges/{job_id}"))
        refused = api.http.post(f"/ui/merges/{job_id}/delete", data={"x": "y"})
        assert "An alias points to this merge (page-test)" in text_of(refused, 409)


class TestKeys:
    def test_another_owners_merge_is_not_there(self, guarded: GuardedApi) -> None:
        job_id = published(guarded.served, owner="alice")
        mine = guarded.send("alice", "GET", f"/ui/merges/{job_id}")
        assert job_id in text_of(mine)
        theirs = guarded.send("bob", "GET", f"/ui/merges/{job_id}")
        never = guarded.send("bob", "GET", "/ui/merges/mrg-none")
        assert (theirs.status_code, never.status_code) == (404, 404)
        for action in ("cancel", "rerun", "delete"):
            assert guarded.send("bob", "POST", f"/ui/merges/{job_id}/{action}").status_code == 404
        assert guarded.send("bob", "POST", f"/ui/merges/{job_id}/alias", data={"name": "mine"}).status_code == 404
        assert not guarded.served.jobs.list(by=None, limit=5).jobs[1:]

    def test_nothing_is_compared_with_another_owners(self, guarded: GuardedApi) -> None:
        mine = published(guarded.served, owner="bob")
        theirs = published(guarded.served, owner="alice", **recipe(parameters={"density": 0.123}))
        for who in ("bob", "admin"):
            text = text_of(guarded.send(who, "GET", f"/ui/merges/{mine}?compare={theirs}"))
            assert "Its owner has no merge with this id." in text
            assert "0.123" not in text

    def test_who_may_only_read_is_offered_nothing_to_do(self, guarded: GuardedApi) -> None:
        job_id = published(guarded.served, owner="alice")
        page = guarded.send("reader", "GET", f"/ui/merges/{job_id}").text
        assert "<button" in page, "to copy and to compare"
        assert 'method="post" action="/ui/merges/' not in page
        for action in ("cancel", "rerun", "delete"):
            assert guarded.send("reader", "POST", f"/ui/merges/{job_id}/{action}").status_code == 403

    def test_an_admin_sees_it_and_points_no_alias_of_another_owner(self, guarded: GuardedApi) -> None:
        job_id = published(guarded.served, owner="alice")
        page = guarded.send("admin", "GET", f"/ui/merges/{job_id}").text
        assert "/delete" in page
        assert "/alias" not in page

    def test_commands_name_the_key_and_never_hold_it(self, guarded: GuardedApi) -> None:
        job_id = published(guarded.served, owner="alice")
        page = guarded.send("alice", "GET", f"/ui/merges/{job_id}").text
        text = unescape(page)
        assert "export HF_TOKEN=$MERGEYARD_API_KEY" in text
        assert 'curl -f -H "authorization: Bearer $MERGEYARD_API_KEY"' in text
        assert guarded.keys["alice"] not in text
