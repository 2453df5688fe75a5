"""The overview, the list, the form and signing in, in a real browser, beside ten thousand merges."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.recipe.difference import as_yaml
from app.records.database import Database
from app.records.job import Kind, NewJob
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.records.points import Points
from app.records.workers import NewWorker, Workers
from app.settings import Settings
from app.tasks.task import TaskScore
from benchmarks import rows
from tests import servers
from tests.api.serving import ServedApi, serving, write_sources
from tests.browser.chromium import Chromium, check_accessible
from tests.browser.yard import Yard, recipe
from tests.records.submitting import new_job
from worker.job import Ending, work
from worker.lease import StopRequest

MANY = 10_000
WRONG = "base_model: models:base\nmerge_method: tiess\nmodels: []\n"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[ServedApi]:
    """An API beside very many merges of many owners."""
    folder = tmp_path_factory.mktemp("many")
    path = folder / "records.sqlite3"
    path.write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{path}")
    rows.fill(database, MANY, lambda _: _new())
    database.close()
    with servers.short_folder() as short, servers.valkey(short / "valkey.sock") as broker:
        settings = Settings(
            data_dir=folder / "data",
            database_url=f"sqlite:///{path}",
            broker_url=broker,
            model_roots=str(write_sources(folder / "models")),
            janitor_seconds=3600,
        )
        with serving(settings) as api:
            yield api


def _new() -> NewJob:
    return new_job(labels={"team": "search"})


TASKS = ("first", "second")


def scored_sweep(yard: Yard, *, scored: int = 100) -> str:
    """A sweep of four points, of which as many have scores that nothing was computed for."""
    for name in TASKS:
        path = yard.api.settings.roots[0] / f"{name}.jsonl"
        path.write_text('{"prompt": "a", "answer": "b"}\n')
    tasks = [{"file": f"models:{name}.jsonl", "metric": "nll", "source": place} for place, name in enumerate(TASKS)]
    asked = {"recipe": recipe(), "grid": {"density": [0.3, 0.6], "lambda": [0.5, 1.0]}, "tasks": tasks}
    answer = yard.api.http.post("/sweeps", json=asked)
    assert answer.status_code == 202, answer.text
    sweep = str(answer.json()["id"])
    job = yard.api.jobs.claim(sweep, lease_seconds=3600)
    assert job is not None
    score_some(yard, sweep, job.lease_token or "", range(min(scored, 7)))
    if scored >= 7:
        yard.api.jobs.conclude(sweep, job.lease_token or "")
    return sweep


def score_some(yard: Yard, sweep: str, token: str, numbers: Iterable[int]) -> None:
    points = Points(yard.api.jobs.database)
    for number in numbers:
        values = (2.0 - number / 4, 2.0 - (number * 3 % 7) / 4)
        scores = [
            TaskScore(name=name, metric="nll", score=value, standard_error=0.1, examples=1)
            for name, value in zip(TASKS, values, strict=True)
        ]
        points.record(sweep, token, number, scores)


def opened(chromium: Chromium, url: str, **options: object) -> Page:
    page = chromium.page(**options)
    page.goto(url)
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
class TestEveryPage:
    def test_the_overview(self, chromium: Chromium, yard: Yard, scheme: str) -> None:
        for state in ("queued", "running", "failed"):
            yard.in_state(state)
        workers, now = Workers(yard.api.jobs.database), yard.api.jobs.database.now()
        worker = NewWorker(name="gpu-host-1", host="h", process=1, queues=["default"], version="0")
        workers.beat(worker, started_at=now, device="cuda:0")
        page = opened(chromium, f"{yard.api.url}/ui", color_scheme=scheme)
        expect(page.locator("h1")).to_have_text("Overview")
        expect(page.get_by_role("progressbar").first).to_be_visible()
        check_accessible(page)
        chromium.screenshot(page, f"overview-{scheme}")

    def test_a_sweep(self, chromium: Chromium, yard: Yard, scheme: str) -> None:
        sweep = scored_sweep(yard)
        page = opened(chromium, f"{yard.api.url}/ui/sweeps/{sweep}", color_scheme=scheme)
        expect(page.locator("tr.best th")).to_contain_text("3")
        page.wait_for_selector("#drawings-box[data-drawn='5']")
        expect(page.locator("#drawing-density-by-lambda .heatmaplayer image")).to_be_attached()
        expect(page.locator("#drawing-by-density .scatterlayer .trace")).to_have_count(2)
        check_accessible(page)
        chromium.screenshot(page, f"sweep-{scheme}")

    def test_the_lists_of_what_scores(self, chromium: Chromium, yard: Yard, scheme: str) -> None:
        scored_sweep(yard)
        for kind in ("sweeps", "evaluations"):
            page = opened(chromium, f"{yard.api.url}/ui/{kind}", color_scheme=scheme)
            expect(page.locator("h1")).to_have_text(kind.capitalize())
            check_accessible(page)

    def test_the_list(self, chromium: Chromium, many: ServedApi, scheme: str) -> None:
        page = opened(chromium, f"{many.url}/ui/merges", color_scheme=scheme)
        expect(page.locator("tbody tr")).to_have_count(50)
        check_accessible(page)
        chromium.screenshot(page, f"merges-{scheme}")

    def test_the_form(self, chromium: Chromium, yard: Yard, scheme: str) -> None:
        page = opened(chromium, f"{yard.api.url}/ui/new", color_scheme=scheme)
        check_accessible(page)
        page.get_by_label("Recipe", exact=True).fill(WRONG)
        page.get_by_role("button", name="Check the plan").click()
        expect(page.locator("li.wrong").first).to_contain_text("did you mean `ties`?")
        check_accessible(page)
        chromium.screenshot(page, f"new-{scheme}")
        chromium.wrong.clear()  # a 422 is written to the console

    def test_a_failure(self, chromium: Chromium, yard: Yard, scheme: str) -> None:
        page = opened(chromium, f"{yard.api.url}/ui/nothing", color_scheme=scheme)
        expect(page.locator("h1")).to_have_text("Not found")
        check_accessible(page)
        chromium.screenshot(page, f"failure-{scheme}")
        chromium.wrong.clear()

    def test_signing_in_and_out(self, chromium: Chromium, many: ServedApi, tmp_path: Path, scheme: str) -> None:
        with guarded(many, tmp_path) as (api, key):
            page = opened(chromium, f"{api.url}/ui/merges", color_scheme=scheme)
            check_accessible(page)
            chromium.screenshot(page, f"sign-in-{scheme}")
            page.get_by_label("Key").fill(key)
            page.get_by_role("button", name="Sign in").click()
            expect(page.locator("h1")).to_have_text("Merges")
            assert page.evaluate("document.cookie") == "", "no script has the session"
            page.get_by_role("button", name="Sign out").click()
            expect(page.locator("h1")).to_have_text("Sign in")
            page.goto(f"{api.url}/ui")
            expect(page.locator("h1")).to_have_text("Sign in")


@contextmanager
def guarded(like: ServedApi, folder: Path) -> Iterator[tuple[ServedApi, str]]:
    """An API with one key, and that key."""
    url = f"sqlite:///{folder}/keys.sqlite3"
    database = Database(url)
    database.migrate()
    made = Keys(database).create(owner="alice", scopes={Scope.READ, Scope.MERGE}, by=Caller(owner="cli:tests"))
    database.close()
    with serving(like.settings.model_copy(update={"database_url": url, "data_dir": folder / "data"})) as api:
        yield api, made.text


@pytest.mark.parametrize("script", [True, False], ids=["script", "no-script"])
def test_a_merge_from_the_form_to_its_download(chromium: Chromium, yard: Yard, script: bool) -> None:
    page = opened(chromium, f"{yard.api.url}/ui/new", java_script_enabled=script)
    page.get_by_label("Recipe", exact=True).fill(as_yaml(recipe(0.25 if script else 0.75)))
    page.get_by_role("button", name="Submit").click()
    expect(page.locator(".status").first).to_have_text("queued")
    job_id = page.url.rpartition("/")[2]
    ends: list[Ending] = []
    worker = threading.Thread(target=lambda: ends.append(work(yard.place, job_id, StopRequest())))
    worker.start()
    expect(page.locator(".status").first).to_have_text("succeeded")
    worker.join()
    assert ends == [Ending.PUBLISHED]
    with page.expect_download() as download:
        page.get_by_role("link", name="model.safetensors", exact=True).click()
    stored = yard.api.http.get(f"/merges/{job_id}/files/model.safetensors").content
    assert Path(download.value.path()).read_bytes() == stored


def test_the_overview_is_live(chromium: Chromium, yard: Yard) -> None:
    page = opened(chromium, f"{yard.api.url}/ui")
    job = yard.running()
    row = page.locator("tr", has=page.get_by_role("progressbar"), has_text=job.id)
    expect(row).to_contain_text("30.0 %")
    yard.progress(job, 80_000_000)
    expect(row).to_contain_text("80.0 %")
    yard.api.jobs.hand_back(job.id, job.lease_token or "")
    expect(row).to_have_count(0)


def test_ten_thousand_merges_are_read_page_by_page_and_filtered(chromium: Chromium, many: ServedApi) -> None:
    page = opened(chromium, f"{many.url}/ui/merges")
    seen = set(page.locator("tbody th").all_inner_texts())
    page.get_by_role("link", name="Older").click()
    page.wait_for_url("**cursor=*")
    older = page.locator("tbody th").all_inner_texts()
    assert len(older) == 50 and not seen & set(older)
    page.get_by_label("Status").select_option("failed")
    page.get_by_label("Owner").fill(rows.OWNERS[0])
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url("**status=failed*")
    assert set(page.locator("tbody .status").all_inner_texts()) == {"failed"}
    assert page.evaluate("document.documentElement.outerHTML.length") < 200_000
    page.goto(f"{many.url}/ui")
    expect(page.locator("#failures ~ .scroll tbody tr").first).to_contain_text(re.compile("[a-z_]+"))


def test_the_keyboard_reaches_the_content_and_everything_in_it(chromium: Chromium, yard: Yard) -> None:
    page = opened(chromium, f"{yard.api.url}/ui/new")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "recipe"
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.name || document.activeElement.textContent"))
    assert names[1:] == ["queue", "priority", "labels", "pinned", "force", "action", "action"]


def test_a_sweep_is_followed_while_it_is_scored(chromium: Chromium, yard: Yard) -> None:
    sweep = scored_sweep(yard, scored=3)
    page = opened(chromium, f"{yard.api.url}/ui/sweeps/{sweep}")
    expect(page.locator(".progress p")).to_have_text("0 of 7 scored")
    expect(page.locator("#drawn")).to_be_hidden()
    token = yard.api.jobs.get(sweep, kind=Kind.SWEEP).lease_token or ""
    score_some(yard, sweep, token, range(3, 7))
    page.wait_for_selector("#drawings-box[data-drawn='5']")
    expect(page.locator("tr.best")).to_have_count(1)
    page.get_by_role("button", name="Merge point 3").click()
    expect(page.locator("h1")).to_have_text(re.compile("^mrg-"))
