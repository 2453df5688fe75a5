"""The pages of sweeps and evaluations, without scripts."""

from __future__ import annotations

import json
import re

import pytest

from app.api.examples import EVALUATION, SWEEP
from app.records.job import Kind
from tests.api.serving import GuardedApi, ServedApi
from tests.client.test_scoring import work
from tests.dashboard.browsing import Browser, signed_in
from tests.dashboard.test_pages import text_of


@pytest.fixture
def sweep(fresh_api: ServedApi) -> str:
    return str(fresh_api.http.post("/sweeps", json={**SWEEP, "labels": {"team": "search"}}).json()["id"])


def test_a_sweeps_page_while_it_waits_and_once_it_is_scored(fresh_api: ServedApi, sweep: str) -> None:
    browser = Browser(fresh_api.url)
    page = browser.open(f"/ui/sweeps/{sweep}")
    told = text_of(page.text)
    assert page.status_code == 200 and "0 of 6 scored" in told and "team: search" in told and "Cancel" in told
    assert re.search(r"base – ", told) and "★" not in told
    work(fresh_api, sweep)
    page = browser.open(f"/ui/sweeps/{sweep}")
    told = text_of(page.text)
    assert re.search(r"3 ★ the best 0\.6 1\.0 0\.7500 500\.0 % 500\.0 %", told), told
    assert "model 0 alone 1.7500" in told and "Cancel" not in told
    drawn = json.loads(re.search(r'id="drawings-data">(.*?)</script>', page.text, re.S).group(1))  # type: ignore[union-attr]
    assert [one["name"] for one in drawn] == ["by-density", "by-lambda", "density-by-lambda", "best-so-far"]
    assert drawn[2]["cells"] == [[2.0, 4.0], [3.0, 5.0]], "the shares kept, line by line of lambda"
    assert sweep in browser.open("/ui/sweeps").text


def test_a_point_is_merged_by_its_button(fresh_api: ServedApi, sweep: str) -> None:
    browser = Browser(fresh_api.url)
    browser.open(f"/ui/sweeps/{sweep}")
    answer = browser.send(f"/ui/sweeps/{sweep}/merges", point="1")
    (merge,) = fresh_api.jobs.list().jobs
    assert answer.status_code == 200 and answer.url.path == f"/ui/merges/{merge.id}"
    browser.open(f"/ui/sweeps/{sweep}")
    refused = browser.send(f"/ui/sweeps/{sweep}/merges", point="9")
    assert refused.status_code == 422 and "4 points, counted from 0" in refused.text


def test_cancel_and_delete(fresh_api: ServedApi, sweep: str) -> None:
    browser = Browser(fresh_api.url)
    browser.open(f"/ui/sweeps/{sweep}")
    assert browser.send(f"/ui/sweeps/{sweep}/cancel").url.path == f"/ui/sweeps/{sweep}"
    assert fresh_api.jobs.get(sweep, kind=Kind.SWEEP).status == "cancelled"
    assert browser.send(f"/ui/sweeps/{sweep}/delete").url.path == "/ui/sweeps"
    assert browser.open(f"/ui/sweeps/{sweep}").status_code == 404 and "None yet" in browser.open("/ui/sweeps").text


def test_an_evaluations_page(fresh_api: ServedApi) -> None:
    evaluation = fresh_api.http.post("/evaluations", json=EVALUATION).json()["id"]
    browser = Browser(fresh_api.url)
    assert "Not scored yet" in browser.open(f"/ui/evaluations/{evaluation}").text
    work(fresh_api, evaluation)
    told = text_of(browser.open(f"/ui/evaluations/{evaluation}").text)
    assert f"Scores of {EVALUATION['model']}" in told and "sql nll 2.0000 0.1000 1" in told
    assert evaluation in browser.open("/ui/evaluations").text


def test_what_runs_is_on_the_overview_and_leads_to_its_page(fresh_api: ServedApi, sweep: str) -> None:
    claimed = fresh_api.jobs.claim(sweep, lease_seconds=3600)
    assert claimed is not None and claimed.lease_token is not None
    fresh_api.jobs.heartbeat(sweep, claimed.lease_token, lease_seconds=3600, progress_bytes=1500)
    page = Browser(fresh_api.url).open("/ui").text
    assert f'href="/ui/sweeps/{sweep}"' in page
    assert re.search(rf"{sweep} ties resolving 25\.0 % – –", text_of(page)), "a sweep has no bytes a second"


def test_nobody_else_sees_them(guarded: GuardedApi) -> None:
    made = guarded.send("alice", "POST", "/sweeps", json=SWEEP).json()["id"]
    for path in (f"/ui/sweeps/{made}", "/ui/sweeps"):
        assert made not in signed_in(guarded, "bob").open(path).text
        assert made in signed_in(guarded, "admin").open(path).text
    reader = signed_in(guarded, "reader").open(f"/ui/sweeps/{made}").text
    assert made in reader and "Cancel" not in reader and "Merge point" not in reader
