"""/metrics, read as Prometheus reads it, on both databases, and compared with what was done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import app
from app.api.figures import OTHER_QUEUES, QUEUES
from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records.tally import Tally
from app.records.transitions import LOST
from app.settings import Settings
from tests.api.serving import ServedApi, serving

Labels = frozenset[tuple[str, str]]


def scrape(api: ServedApi) -> Mapping[tuple[str, Labels], float]:
    """Every sample by name and labels."""
    answer = api.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def series(found: Mapping[tuple[str, Labels], float], name: str) -> dict[str, float]:
    """Of a metric with one label, the samples by its value."""
    return {"".join(value for _, value in labels): value for (sample, labels), value in found.items() if sample == name}


def count(api: ServedApi) -> None:
    """What the janitor does at the end of each round."""
    Tally(api.jobs.database).count()


def test_the_figures_of_jobs_are_what_happened_to_them(fresh_api: ServedApi) -> None:
    api, jobs = fresh_api, fresh_api.jobs
    sizes = [api.published({"config.json": b"{}"}).artifact["size"] for _ in range(2)]  # type: ignore[index]
    for queue, number in (("gpu", 3), ("cpu", 1)):
        for _ in range(number):
            api.queued(queue=queue)
    failed, retried, running = api.running(), api.running(), api.running()
    jobs.fail(failed.id, failed.lease_token or "", MergeyardError("source_not_finite", "NaN"), retry=False)
    jobs.fail(retried.id, retried.lease_token or "", MergeyardError("disk_full", "full"), retry=True)
    file = StoredFile(name="a", key="a", size=1234, sha256="0" * 64)
    jobs.record_shard(running.id, running.lease_token or "", file, {})
    jobs.request_cancel(api.running().id)
    count(api)
    found = scrape(api)
    assert series(found, "mergeyard_queue_jobs") == {"gpu": 3, "cpu": 1, "default": 1}
    assert series(found, "mergeyard_jobs") == {"queued": 5, "running": 1, "cancelling": 1}
    assert series(found, "mergeyard_submitted_total") == {"": 10}
    assert series(found, "mergeyard_attempts_total") == {"": 6}
    assert series(found, "mergeyard_finished_total") == {"succeeded": 2, "reused": 0, "failed": 1, "cancelled": 0}
    assert series(found, "mergeyard_leases_lost_total") == dict.fromkeys(LOST, 0)
    failures, retries = series(found, "mergeyard_failures_total"), series(found, "mergeyard_retries_total")
    assert failures["source_not_finite"] == 1 == sum(failures.values())
    assert retries["disk_full"] == 1 == sum(retries.values())
    assert failures["internal"] == 0, "an alert needs the 0 before the first"
    assert series(found, "mergeyard_handed_back_total") == {"": 0}
    assert series(found, "mergeyard_written_bytes_total") == {"": 1234}
    assert series(found, "mergeyard_published_bytes_total") == {"": sum(sizes)}
    assert series(found, "mergeyard_stage_seconds_count") == {"queued": 6, "resolving": 4}
    ages = series(found, "mergeyard_queue_oldest_seconds")
    assert set(ages) == {"gpu", "cpu", "default"} and all(0 <= age < 300 for age in ages.values())


def test_every_replica_tells_the_same_of_jobs(fresh_api: ServedApi) -> None:
    for _ in range(3):
        fresh_api.published({"config.json": b"{}"})
    count(fresh_api)
    with serving(fresh_api.settings) as other:
        one, another = scrape(fresh_api), scrape(other)
    names = ("mergeyard_finished_total", "mergeyard_stage_seconds_bucket", "mergeyard_stage_seconds_sum")
    for name in names:
        mine = {key: value for key, value in one.items() if key[0] == name}
        assert mine and mine == {key: value for key, value in another.items() if key[0] == name}


def test_a_janitors_round_counts(tmp_path: Path, sqlite_url: str, api_broker: str) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, broker_url=api_broker, janitor_seconds=0.05)
    with serving(settings) as api:
        api.queued()
        found: dict[str, float] = {}
        while found != {"": 1}:  # the test's own time limit ends it
            found = series(scrape(api), "mergeyard_submitted_total")


def test_requests_are_counted_by_route_and_status(fresh_api: ServedApi) -> None:
    merge = fresh_api.queued().id
    for path in ("/merges", "/merges", f"/merges/{merge}", "/merges/mrg-nowhere", "/nowhere", "/merges?limit=x"):
        fresh_api.http.get(path)
    fresh_api.http.post("/merges", json={"recipe": 1})
    fresh_api.http.put("/merges")
    fresh_api.http.request("BREW", "/merges")
    found = scrape(fresh_api)

    def requests(method: str, route: str, status: int) -> float | None:
        labels = {"method": method, "route": route, "status": str(status)}
        return found.get(("mergeyard_http_requests_total", frozenset(labels.items())))

    assert requests("GET", "/merges", 200) == 2
    assert requests("GET", "/merges", 422) == 1
    assert requests("GET", "/merges/{id}", 200) == 1
    assert requests("GET", "/merges/{id}", 404) == 1
    assert requests("GET", "none", 404) == 1
    assert requests("POST", "/merges", 422) == 1
    assert requests("PUT", "/merges", 405) == 1
    assert requests("other", "/merges", 405) == 1
    routes = {dict(labels)["route"] for name, labels in found if name == "mergeyard_http_requests_total"}
    assert routes == {"/merges", "/merges/{id}", "none"}
    seconds = frozenset({"method": "GET", "route": "/merges"}.items())
    assert found["mergeyard_http_request_seconds_count", seconds] == 3
    assert found["mergeyard_http_request_seconds_sum", seconds] > 0


def test_many_queues_are_told_as_the_longest_and_the_others(fresh_api: ServedApi) -> None:
    for number in range(QUEUES + 2):
        for _ in range(1 if number < 3 else 2):
            fresh_api.queued(queue=f"q{number:03}")
    depths = series(scrape(fresh_api), "mergeyard_queue_jobs")
    assert len(depths) == QUEUES + 1
    assert depths[OTHER_QUEUES] == 2 and depths["q000"] == 1 and "q002" not in depths


def test_disks_parts_and_the_version_are_told(fresh_api: ServedApi) -> None:
    found = scrape(fresh_api)
    usage = shutil.disk_usage(fresh_api.settings.artifacts)
    assert series(found, "mergeyard_disk_size_bytes") == {"store": usage.total, "data": usage.total}
    assert set(series(found, "mergeyard_disk_free_bytes")) == {"store", "data"}
    assert series(found, "mergeyard_ready") == {"database": 1, "queue": 1, "store": 1, "data": 1}
    build = next(dict(labels) for name, labels in found if name == "mergeyard_build_info")
    assert build == {"version": app.__version__, "database": fresh_api.jobs.database.dialect}
    assert ("process_resident_memory_bytes", frozenset()) in found


def test_parts_that_cannot_work_are_told_and_the_rest_goes_on(tmp_path: Path, sqlite_url: str) -> None:
    (tmp_path / "artifacts").write_text("a file where the store's folder should be")
    broker = f"redis+socket://{tmp_path}/nobody.sock"
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, broker_url=broker, janitor_seconds=3600)
    with serving(settings) as api:
        api.queued()
        found = scrape(api)
    assert series(found, "mergeyard_ready") == {"database": 1, "queue": 0, "store": 0, "data": 1}
    assert series(found, "mergeyard_queue_jobs") == {"default": 1}


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=1.0.0"])
def test_it_speaks_openmetrics_to_whom_asks(fresh_api: ServedApi, accept: str) -> None:
    answer = fresh_api.http.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families: list[Any] = list(openmetrics(answer.text))
    assert "mergeyard_queue_jobs" in {family.name for family in families}


def test_the_runbook_names_every_figure_and_no_other(fresh_api: ServedApi) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = text[text.index("| metric |") : text.index("## Alerts")]
    families = {
        name if kind != "counter" else f"{name}_total"
        for name, kind in re.findall(
            r"^# TYPE (\w+?)(?:_total)? (\w+)$", fresh_api.http.get("/metrics").text, re.MULTILINE
        )
        if name.startswith("mergeyard_") and not name.endswith("_created")
    }
    told = set(re.findall(r"`(mergeyard_\w+)`", table))
    assert told == families
    used = set(re.findall(r"mergeyard_\w+", text[text.index("## Alerts") :]))
    assert {re.sub("_bucket$", "", name) for name in used} <= told
