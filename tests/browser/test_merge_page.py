"""The page of a merge in a real browser, in every state, with real merges behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.records.job import Stage
from tests.browser.chromium import Chromium, check_accessible
from tests.browser.yard import LAYERS, Yard, recipe
from worker.job import Ending, work
from worker.lease import StopRequest

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def open_merge(chromium: Chromium, yard: Yard, job_id: str, query: str = "", **options: Any) -> Page:
    page = chromium.page(**options)
    page.goto(f"{yard.api.url}/ui/merges/{job_id}{query}")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_every_state(chromium: Chromium, yard: Yard, state: str, scheme: str) -> None:
    page = open_merge(chromium, yard, yard.in_state(state), color_scheme=scheme)
    expect(page.locator(".status").first).to_have_text(state)
    if state == "succeeded":
        page.locator("#heatmap").scroll_into_view_if_needed()
        page.wait_for_selector("#heatmap[data-drawn]")
    check_accessible(page)
    chromium.screenshot(page, f"merge-{state}-{scheme}")


def test_a_whole_family_with_a_difference(chromium: Chromium, yard: Yard) -> None:
    first, second = yard.merged(), yard.merged(recipe(0.3, parameters={"lambda": 0.8}))
    both = {"merge_method": "linear", "models": [{"model": f"merge:{job_id}"} for job_id in (first, second)]}
    third = yard.merged({**both, "parameters": {"weight": 0.5}}, labels={"team": "search", "ticket": "ML-7"})
    yard.api.http.put("/aliases/production", json={"merge": first}).raise_for_status()
    page = open_merge(chromium, yard, first, f"?compare={second}")
    expect(page.locator("svg.lineage .node")).to_have_count(6)
    expect(page.locator(".difference del")).to_have_count(3)
    check_accessible(page)
    chromium.screenshot(page, "merge-family")
    page.locator("svg.lineage a", has_text="linear").click()
    expect(page.locator("h1")).to_have_text(third)
    expect(page.locator("svg.lineage a")).to_have_count(2)


class TestHeatmap:
    def test_it_is_drawn_and_a_pointer_is_told_the_numbers(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.merged())
        page.locator("#heatmap").scroll_into_view_if_needed()
        page.wait_for_selector("#heatmap[data-drawn=sign_conflict]")
        image = page.locator("#plot .heatmaplayer image")
        expect(image).to_have_attribute("href", re.compile("^data:image/png;base64,.{100,}"))
        box = image.bounding_box()
        assert box is not None and box["width"] > 300 and box["height"] > 100
        told = hover(page, column=2, row=3)
        layer, module = told.partition("sign conflict")[0].removeprefix("layer ").split(" · ")
        assert layer == "2"
        page.locator("summary", has_text="Sign conflict, layer by layer").click()
        heads = page.locator("table.figures").first.locator("thead th").all_inner_texts()
        cells = page.locator("table.figures").first.locator("tbody tr").nth(2).locator("td").all_inner_texts()
        shown = cells[heads.index(module) - 1]
        assert f"sign conflict {shown}" in told, "the table has the same"
        assert re.search(r"share trimmed [\d.]+ %norm of the change [\d.]+", told)

    def test_it_is_coloured_by_what_is_chosen(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.merged())
        page.locator("#heatmap").scroll_into_view_if_needed()
        page.wait_for_selector("#heatmap[data-drawn=sign_conflict]")
        before = page.locator("#plot .heatmaplayer image").get_attribute("href")
        page.get_by_role("radio", name="Norm of the change").check()
        page.wait_for_selector("#heatmap[data-drawn=norm]")
        assert page.locator("#plot .heatmaplayer image").get_attribute("href") != before

    def test_it_is_loaded_once_it_comes_into_view(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.merged())
        assert page.evaluate("typeof Plotly") == "undefined"
        page.locator("#heatmap").scroll_into_view_if_needed()
        page.wait_for_selector("#heatmap[data-drawn]")
        assert page.evaluate("typeof Plotly") == "object"


def hover(page: Page, *, column: int, row: int) -> str:
    """Put the pointer on a cell, and wait for what it is told."""
    area = page.locator("#plot .nsewdrag").first.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + 1, area["y"] + 1)
    x = area["x"] + area["width"] * (column + 0.5) / LAYERS
    page.mouse.move(x, area["y"] + area["height"] * (row + 0.5) / 7, steps=4)
    label = page.locator("#plot .hoverlayer .hovertext")
    expect(label).to_contain_text(f"layer {column}")
    return label.text_content() or ""


class TestCopying:
    def test_the_recipe(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.submit(), permissions=["clipboard-read", "clipboard-write"])
        page.locator("button[data-copy=recipe-sent]").click()
        expect(page.locator("button[data-copy=recipe-sent]")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        sent = yard.api.http.post("/merges/plan", content=copied, headers={"content-type": "application/yaml"})
        assert sent.status_code == 200, sent.text

    def test_without_the_clipboards_permission_the_text_is_selected(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.submit())
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: {writeText: () => Promise.reject()}})")
        page.locator("button[data-copy=recipe-sent]").click()
        expect(page.locator("button[data-copy=recipe-sent]")).to_have_text("Press Ctrl+C")
        assert "merge_method: ties" in page.evaluate("getSelection().toString()")


class TestActing:
    def test_cancel(self, chromium: Chromium, yard: Yard) -> None:
        job_id = yard.submit()
        page = open_merge(chromium, yard, job_id)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".status").first).to_have_text("cancelled")
        assert yard.api.jobs.get(job_id).status == "cancelled"

    def test_run_again(self, chromium: Chromium, yard: Yard) -> None:
        job_id = yard.cancelled()
        page = open_merge(chromium, yard, job_id)
        page.get_by_label("also where an equal result exists").check()
        page.get_by_role("button", name="Run again").click()
        expect(page.locator(".status").first).to_have_text("queued")
        again = page.url.rpartition("/")[2]
        assert again != job_id
        assert yard.api.jobs.get(again).recipe == yard.api.jobs.get(job_id).recipe

    def test_delete_asks_first(self, chromium: Chromium, yard: Yard) -> None:
        job_id = yard.cancelled()
        page = open_merge(chromium, yard, job_id)
        button = page.get_by_role("button", name="Delete this merge")
        expect(button).to_be_hidden()
        page.locator("summary", has_text="Delete…").click()
        button.click()
        page.wait_for_url("**/ui/merges")
        assert yard.api.http.get(f"/merges/{job_id}").status_code == 404

    def test_a_download(self, chromium: Chromium, yard: Yard) -> None:
        job_id = yard.merged()
        page = open_merge(chromium, yard, job_id)
        with page.expect_download() as download:
            page.get_by_role("link", name="config.json", exact=True).click()
        stored = yard.api.http.get(f"/merges/{job_id}/files/config.json").content
        assert Path(download.value.path()).read_bytes() == stored


def test_a_merge_is_followed_from_the_queue_to_its_end(chromium: Chromium, yard: Yard) -> None:
    job_id = yard.submit()
    page = open_merge(chromium, yard, job_id)
    expect(page.locator(".status").first).to_have_text("queued")
    job = yard.api.jobs.claim(job_id, lease_seconds=3600, worker="gpu-host-1")
    assert job is not None
    expect(page.locator(".status").first).to_have_text("running")
    yard.api.jobs.set_stage(job_id, job.lease_token or "", Stage.MERGING)
    expect(page.locator("#stages ~ .stage-times")).to_contain_text("merging")
    yard.progress(job, 20_000_000)
    expect(page.locator("#fraction")).to_have_text("20.0 %")
    yard.progress(job, 60_000_000)
    expect(page.locator("#fraction")).to_have_text("60.0 %")
    expect(page.locator("#bar")).to_have_js_property("value", 0.6)
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ [kMG]?B/s$"))
    expect(page.locator("#left")).to_have_text(re.compile("^about .+ left$"))
    chromium.screenshot(page, "merge-live")
    yard.api.jobs.hand_back(job_id, job.lease_token or "")
    expect(page.locator(".status").first).to_have_text("queued")
    assert work(yard.place, job_id, StopRequest()) is Ending.PUBLISHED
    expect(page.locator(".status").first).to_have_text("succeeded")
    expect(page.locator("#files")).to_be_visible()


class TestWithoutScript:
    def test_the_numbers_are_readable(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.merged(), java_script_enabled=False)
        expect(page.locator("#heatmap")).to_be_hidden()
        expect(page.locator("button[data-copy]").first).to_be_hidden()
        page.locator("summary", has_text="Sign conflict, layer by layer").click()
        row = page.locator("table.figures").first.locator("tbody tr").first
        assert re.fullmatch(r"0(\s+[\d.]+ %){7}", row.inner_text())
        chromium.screenshot(page, "merge-without-script")

    def test_a_running_merge_loads_itself_anew(self, chromium: Chromium, yard: Yard) -> None:
        job = yard.running()
        page = open_merge(chromium, yard, job.id, java_script_enabled=False)
        expect(page.locator("#fraction")).to_have_text("30.0 %")
        yard.progress(job, 70_000_000)
        expect(page.locator("#fraction")).to_have_text("70.0 %")

    def test_cancel(self, chromium: Chromium, yard: Yard) -> None:
        page = open_merge(chromium, yard, yard.submit(), java_script_enabled=False)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".status").first).to_have_text("cancelled")
