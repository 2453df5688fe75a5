"""/healthz and /readyz."""

from __future__ import annotations

from pathlib import Path

from app.settings import Settings
from tests.api.serving import ServedApi, problem, serving


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
