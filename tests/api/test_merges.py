"""GET /merges, /merges/{id} and its events; cancel and delete."""

from __future__ import annotations

from app.errors import MergeyardError
from tests.api.serving import ServedApi, problem


class TestList:
    def test_pages_show_every_merge_once_newest_first(self, fresh_api: ServedApi) -> None:
        made = [fresh_api.queued().id for _ in range(5)]
        seen, path = [], "/merges?limit=2"
        while path:
            response = fresh_api.http.get(path)
            seen.append([item["id"] for item in response.json()["items"]])
            path = response.links.get("next", {}).get("url", "")
            assert bool(path) == (response.json()["next_cursor"] is not None)
        assert [len(page) for page in seen] == [2, 2, 1]
        assert [id for page in seen for id in page] == made[::-1]

    def test_filters_by_status_and_method_and_keeps_them_in_the_next_link(self, fresh_api: ServedApi) -> None:
        queued = fresh_api.queued(method="linear").id
        running = fresh_api.running(method="linear").id
        fresh_api.queued(method="ties")
        done = fresh_api.published({}, method="linear").id

        def ids(query: str) -> list[str]:
            return [item["id"] for item in fresh_api.http.get(f"/merges?{query}").json()["items"]]

        assert ids("status=running") == [running]
        assert ids("status=queued&status=succeeded&method=linear") == [done, queued]
        link = fresh_api.http.get("/merges?method=linear&status=queued&status=running&limit=1").links["next"]["url"]
        assert "method=linear&status=queued&status=running&limit=1&cursor=" in link

    def test_leaves_out_recipes(self, api: ServedApi) -> None:
        api.submit()
        assert "recipe" not in api.http.get("/merges").json()["items"][0]


class TestLooking:
    def test_an_unchanged_merge_is_not_sent_again(self, api: ServedApi) -> None:
        path = f"/merges/{api.queued().id}"
        first = api.http.get(path)
        again = api.http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert again.headers["retry-after"]

    def test_a_change_changes_the_etag(self, api: ServedApi) -> None:
        job = api.running()
        path = f"/merges/{job.id}"
        etag = api.http.get(path).headers["etag"]
        api.jobs.heartbeat(job.id, job.lease_token or "", lease_seconds=60, progress_bytes=25)
        changed = api.http.get(path, headers={"If-None-Match": etag})
        assert changed.status_code == 200
        assert changed.json()["progress"] == {"bytes_done": 25, "bytes_total": 100, "fraction": 0.25}

    def test_a_finished_merge_asks_for_no_more_polling(self, api: ServedApi) -> None:
        response = api.http.get(f"/merges/{api.published({'a.txt': b'a'}).id}")
        assert "retry-after" not in response.headers
        assert response.json()["status"] == "succeeded"
        assert response.json()["artifact"]["files"] == 2
        assert response.json()["progress"]["fraction"] == 1.0

    def test_a_failed_merge_says_why(self, api: ServedApi) -> None:
        job = api.running()
        error = MergeyardError("source_not_finite", "model.safetensors holds NaN", where="models[0]")
        api.jobs.fail(job.id, job.lease_token or "", error, retry=False)
        found = api.http.get(f"/merges/{job.id}").json()["error"]
        assert (found["code"], found["where"], found["fault"]) == ("source_not_finite", "models[0]", "user")
        assert found["detail"] == "model.safetensors holds NaN"

    def test_events_come_in_order_and_can_be_asked_for_from_a_number_on(self, api: ServedApi) -> None:
        job = api.running()
        api.jobs.set_stage(job.id, job.lease_token or "", "merging")
        page = api.http.get(f"/merges/{job.id}/events").json()
        assert [event["type"] for event in page["items"]] == ["submitted", "claimed", "stage"]
        rest = api.http.get(f"/merges/{job.id}/events", params={"after": page["items"][1]["id"]}).json()
        assert [event["type"] for event in rest["items"]] == ["stage"]
        assert rest["after"] == page["after"] == page["items"][-1]["id"]
        assert api.http.get(f"/merges/{job.id}/events?limit=1").json()["after"] == page["items"][0]["id"]


class TestCancel:
    def test_a_queued_merge_is_cancelled_at_once(self, api: ServedApi) -> None:
        response = api.http.post(f"/merges/{api.queued().id}/cancel")
        assert (response.status_code, response.json()["status"]) == (202, "cancelled")

    def test_a_running_merge_is_asked_to_stop_however_often(self, api: ServedApi) -> None:
        path = f"/merges/{api.running().id}/cancel"
        for _ in range(2):
            response = api.http.post(path)
            assert (response.status_code, response.json()["status"]) == (202, "cancelling")

    def test_a_finished_merge_cannot_be_cancelled(self, api: ServedApi) -> None:
        problem(api.http.post(f"/merges/{api.published({}).id}/cancel"), 409, "conflict")


class TestDelete:
    def test_a_finished_merge_goes_with_its_files(self, api: ServedApi) -> None:
        job = api.published({"model.safetensors": b"x" * 1000})
        assert (api.settings.artifacts / job.id).exists()
        assert api.http.delete(f"/merges/{job.id}").status_code == 204
        assert not (api.settings.artifacts / job.id).exists()
        problem(api.http.get(f"/merges/{job.id}"), 404, "not_found")
        problem(api.http.get(f"/merges/{job.id}/files"), 404, "not_found")
        problem(api.http.delete(f"/merges/{job.id}"), 404, "not_found")

    def test_an_unfinished_merge_cannot_be_deleted(self, api: ServedApi) -> None:
        for job in (api.queued(), api.running()):
            problem(api.http.delete(f"/merges/{job.id}"), 409, "conflict")

    def test_it_is_no_source_any_more(self, api: ServedApi) -> None:
        job = api.published({"model.safetensors": b"x"})
        api.http.delete(f"/merges/{job.id}")
        recipe = {"merge_method": "linear", "models": [{"model": f"merge:{job.id}"}]}
        problem(api.http.post("/merges/plan", json={"recipe": recipe}), 422, "source_not_found")


def test_the_reason_of_each_failed_attempt_is_shown(api: ServedApi) -> None:
    job = api.running(max_attempts=2)
    api.jobs.fail(job.id, job.lease_token or "", MergeyardError("out_of_memory", "Too little."), retry=True)
    waiting = api.http.get(f"/merges/{job.id}").json()
    assert (waiting["status"], waiting["attempt"], waiting["error"]) == ("queued", 1, None)
    again = api.jobs.claim(job.id, lease_seconds=3600)
    assert again is not None
    api.jobs.fail(job.id, again.lease_token or "", MergeyardError("disk_full", "Full."), retry=True)
    failed = api.http.get(f"/merges/{job.id}").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full")
    reasons = [(failure["attempt"], failure["code"], failure["message"]) for failure in failed["failures"]]
    assert reasons == [(1, "out_of_memory", "Too little."), (2, "disk_full", "Full.")]
    assert "failures" not in api.http.get("/merges").json()["items"][0]
