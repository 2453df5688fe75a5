"""What quotas and a full disk answer over HTTP, and that slow plans keep nobody else waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.examples import RECIPE
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.records.quotas import Quotas
from app.settings import Settings
from tests import files
from tests.api.serving import ServedApi, problem, serving
from tests.api.test_metrics import scrape, series
from tests.api.test_uploads import parts_of


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str, sources_root: Path, api_broker: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=sqlite_url,
        broker_url=api_broker,
        model_roots=str(sources_root),
        janitor_seconds=3600,
    )


def serving_with(settings: Settings, **changes: Any) -> Any:
    return serving(settings.model_copy(update=changes))


def planned_bytes(api: ServedApi) -> int:
    plan = api.http.post("/merges/plan", json={"recipe": RECIPE}).json()
    return int(plan["reserved_bytes"])


def test_what_a_plan_would_reserve_is_what_the_merge_reserves_until_it_ends(settings: Settings) -> None:
    with serving(settings) as api:
        size = planned_bytes(api)
        merge = api.submit()
        assert size == Quotas(api.jobs.database).of_owner("local").reserved > 0
        assert series(scrape(api), "mergeyard_reserved_bytes") == {"": size}
        api.http.post(f"/merges/{merge['id']}/cancel")
        assert Quotas(api.jobs.database).of_owner("local").reserved == 0
        published = api.published({"config.json": b"{}"})
        used = series(scrape(api), "mergeyard_used_bytes")
        assert used == {"artifacts": published.artifact_bytes, "uploads": 0} and published.artifact_bytes > 0


def test_an_owner_over_quota_is_refused_and_a_repeated_request_is_not(settings: Settings) -> None:
    with serving(settings) as api:
        size = planned_bytes(api)
    with serving_with(settings, quota_bytes_per_owner=2 * size - 1, quota_bytes=10 * size) as api:
        first = api.http.post("/merges", json={"recipe": RECIPE}, headers={"idempotency-key": "k"})
        document = problem(api.http.post("/merges", json={"recipe": RECIPE}), 413, "over_quota")
        assert document["fault"] == "user" and f"{2 * size - 1}" in document["detail"]
        again = api.http.post("/merges", json={"recipe": RECIPE}, headers={"idempotency-key": "k"})
        assert again.status_code == 202 and again.json()["id"] == first.json()["id"]
        assert len(api.http.get("/merges").json()["items"]) == 1
        assert series(scrape(api), "mergeyard_quota_bytes") == {"": 10 * size}


def test_a_key_with_a_quota_of_its_own_has_that_and_not_every_owners(settings: Settings) -> None:
    with serving_with(settings, quota_bytes_per_owner=0) as api:
        keys = Keys(api.jobs.database)
        texts = [
            keys.create(owner="alice", scopes=[Scope.MERGE], by=Caller(owner="cli:tests"), quota_bytes=quota).text
            for quota in (None, 10**9)
        ]
        answers = [
            api.http.post("/merges", json={"recipe": RECIPE}, headers={"authorization": f"Bearer {text}"})
            for text in texts
        ]
    problem(answers[0], 413, "over_quota")
    assert answers[1].status_code == 202


def test_too_many_unfinished_merges_are_refused_until_one_has_finished(settings: Settings) -> None:
    with serving_with(settings, max_jobs_per_owner=1) as api:
        first = api.submit()
        refused = api.http.post("/merges", json={"recipe": RECIPE})
        problem(refused, 429, "too_many_jobs")
        assert int(refused.headers["retry-after"]) >= 1
        api.http.post(f"/merges/{first['id']}/cancel")
        api.submit()


def test_a_disk_without_room_takes_no_merge_and_no_upload(settings: Settings, tmp_path: Path) -> None:
    adapter = files.write_adapter(tmp_path / "adapter")
    with serving_with(settings, min_free_bytes=1 << 60) as api:
        document = problem(api.http.post("/merges", json={"recipe": RECIPE}), 507, "storage_full")
        assert document["fault"] == "system" and "0 bytes free" in document["detail"]
        problem(api.http.post("/uploads", files=parts_of(adapter)), 507, "disk_full")
        assert list(api.settings.uploads.iterdir()) == []
        assert api.http.get("/readyz").status_code == 200, "what is there can be looked at and downloaded"


@pytest.mark.parametrize("announced", [True, False])
def test_an_upload_over_quota_is_refused_and_leaves_nothing(
    settings: Settings, tmp_path: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if announced:
        monkeypatch.delattr("app.sources.uploads.UploadStore.begin")  # it is not even received
    parts = parts_of(files.write_adapter(tmp_path / "adapter"))
    with serving_with(settings, quota_bytes_per_owner=1000) as api:
        request = api.http.build_request("POST", "/uploads", files=parts)
        if announced:
            answer = api.http.send(request)
        else:
            headers = {"content-type": request.headers["content-type"]}
            body = request.read()
            answer = api.http.post("/uploads", content=iter([body[:100], body[100:]]), headers=headers)
        problem(answer, 413, "over_quota")
        assert not api.settings.uploads.exists() or list(api.settings.uploads.iterdir()) == []
        assert Quotas(api.jobs.database).of_owner("local").uploads == 0


def test_an_upload_that_nobody_owns_any_more_works_again_once_it_is_sent_again(
    settings: Settings, tmp_path: Path
) -> None:
    """Uploads made before migration 0002 have no owner."""
    parts = parts_of(files.write_adapter(tmp_path / "adapter"))
    with serving(settings) as api:
        reference = api.http.post("/uploads", files=parts).json()["reference"]
        with api.jobs.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM uploads")
        recipe = {**RECIPE, "models": [{"adapter": reference}]}
        document = problem(api.http.post("/merges/plan", json={"recipe": recipe}), 422, "source_not_found")
        assert "upload the files again" in document["detail"]
        again = api.http.post("/uploads", files=parts)
        assert again.json()["reference"] == reference and again.status_code == 201
        assert api.http.post("/merges/plan", json={"recipe": recipe}).status_code == 200


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Plans that take until the event is set."""
    done = threading.Event()

    def slowly(*arguments: Any) -> Plan:
        assert done.wait(60)
        return make_plan(*arguments)

    monkeypatch.setattr("app.api.merges.make_plan", slowly)
    yield done
    done.set()


@pytest.mark.parametrize("path", ["/merges/plan", "/merges"])
def test_slow_plans_keep_nobody_else_waiting(settings: Settings, slow: threading.Event, path: str) -> None:
    """More of them than the API has threads: two are planned, the others are told to come again."""
    crowd = 60
    with (
        serving_with(settings, plans_at_once=2, plan_wait_seconds=0.5) as api,
        ThreadPoolExecutor(crowd) as senders,
        httpx.Client(base_url=api.url, timeout=60, limits=httpx.Limits(max_connections=crowd)) as crowded,
    ):
        sent = [senders.submit(crowded.post, path, json={"recipe": RECIPE}) for _ in range(crowd)]
        busy = 0
        while busy < crowd - 2:  # the test's own time limit ends it
            assert api.http.get("/healthz").status_code == api.http.get("/merges").status_code == 200
            busy = sum(future.done() for future in sent)
        slow.set()
        answers = [future.result() for future in sent]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == crowd - 2
    for answer in refused:
        problem(answer, 503, "busy")
        assert int(answer.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in answers} - {503} <= {200, 202}


def test_a_data_folder_that_takes_no_writes_is_not_ready(tmp_path: Path, sqlite_url: str, api_broker: str) -> None:
    folder = tmp_path / "data"
    folder.write_text("a file where the folder should be")
    settings = Settings(
        data_dir=folder,
        database_url=sqlite_url,
        broker_url=api_broker,
        artifact_store=str(tmp_path / "artifacts"),
        janitor_seconds=3600,
    )
    with serving(settings) as api:
        document = problem(api.http.get("/readyz"), 503, "not_ready")
        assert [found["where"] for found in document["problems"]] == ["data"]
        assert series(scrape(api), "mergeyard_ready") == {"database": 1, "queue": 1, "store": 1, "data": 0}
