"""/healthz and /readyz."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.settings import Settings
from tests.api.serving import ServedApi, problem, serving
from tests.faults.cuts import server_address, through
from tests.faults.proxy import Proxy, proxied


def test_a_live_process_says_so(api: ServedApi) -> None:
    assert api.http.get("/healthz").json()["status"] == "ok"


def test_a_service_that_can_work_is_ready(api: ServedApi) -> None:
    assert api.http.get("/readyz").json() == {
        "status": "ok",
        "database": "ok",
        "queue": "ok",
        "store": "ok",
        "data": "ok",
    }


def test_every_part_that_cannot_work_is_named(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file where the store's folder should be")
    settings = Settings(data_dir=tmp_path, broker_url=f"redis+socket://{tmp_path}/nobody.sock", janitor_seconds=3600)
    with serving(settings) as api:
        document = problem(api.http.get("/readyz"), 503, "not_ready")
        assert [found["where"] for found in document["problems"]] == ["database", "queue", "store"]
        assert "mergeyard migrate" in document["problems"][0]["message"]
        assert api.http.get("/healthz").status_code == 200


def test_a_database_that_hangs_is_told_by_everything_but_healthz(
    tmp_path: Path, postgres_database: str, api_broker: str
) -> None:
    """More requests wait for it than the process has threads."""
    between = Proxy(("127.0.0.1", 0), server_address(postgres_database), random.Random(0), {"none": 1})
    with proxied(between):
        settings = Settings(
            data_dir=tmp_path,
            database_url=through(postgres_database, between.port),
            database_seconds=1,
            broker_url=api_broker,
            janitor_seconds=3600,
        )
        with serving(settings) as api, ThreadPoolExecutor(60) as pool:
            assert api.http.get("/merges").status_code == 200
            between.hang()
            waiting = [pool.submit(api.http.get, "/merges", timeout=60) for _ in range(60)]
            assert api.http.get("/healthz", timeout=1).status_code == 200
            for answer in waiting:
                problem(answer.result(), 503, "database_unavailable")
            document = problem(api.http.get("/readyz"), 503, "database_unavailable")
            assert [found["where"] for found in document["problems"]] == ["database"]
            between.recover()
            assert api.http.get("/readyz").status_code == 200
            assert api.http.get("/merges").status_code == 200
