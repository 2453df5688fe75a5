"""The overview, the list and the form, without scripts."""

from __future__ import annotations

import re

import pytest

from app.api.examples import RECIPE_YAML
from app.dashboard.overview import grouped
from app.errors import MergeyardError
from app.records.workers import NewWorker, Workers
from tests.api.serving import GuardedApi, ServedApi
from tests.dashboard.browsing import Browser, signed_in


def text_of(page: str) -> str:
    """What is read, tags and spaces aside."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def fail(served: ServedApi, code: str, **changes: str) -> str:
    job = served.running(**changes)
    served.jobs.fail(job.id, job.lease_token or "", MergeyardError(code, "It did."), retry=False)
    return job.id


def test_the_overview_says_what_waits_runs_and_failed(fresh_api: ServedApi) -> None:
    jobs = fresh_api.jobs
    queued = [fresh_api.queued(queue="large") for _ in range(3)]
    job = fresh_api.running()
    jobs.set_stage(job.id, job.lease_token or "", "merging")
    jobs.heartbeat(job.id, job.lease_token or "", lease_seconds=3600, progress_bytes=25)
    failed = [fail(fresh_api, "source_not_finite") for _ in range(2)] + [fail(fresh_api, "out_of_memory")]
    workers = Workers(jobs.database)
    now = jobs.database.now()
    new = NewWorker(name="gpu-1", host="h", process=1, queues=["default"], version="0")
    workers.beat(new, started_at=now, device="cuda:0")
    page = Browser(fresh_api.url).open("/ui").text
    told = text_of(page)
    assert f"{len(queued)} waiting" in told and "1 running" in told and "1 worker alive" in told
    assert re.search(r"large 3 [\d.]+ s 0 nobody", told), "nobody serves it, and that is seen"
    assert re.search(rf"{job.id} ties merging 25\.0 % [\d.]+ B/s [\d.]+ s", told)
    assert re.search(r"gpu-1 idle cuda:0 –", told)
    assert re.search(r"source_not_finite A source holds NaN or infinity 2 ", told)
    for merge_id in (job.id, *failed):
        assert f'href="/ui/merges/{merge_id}"' in page


def test_a_part_that_cannot_work_is_an_alarm(fresh_api: ServedApi) -> None:
    store = fresh_api.settings.artifacts
    assert "cannot be used" not in Browser(fresh_api.url).open("/ui").text
    store.rmdir()
    store.write_text("in the way")
    page = Browser(fresh_api.url).open("/ui")
    assert page.status_code == 200 and "The store cannot be used:" in text_of(page.text)


def test_failures_of_one_code_stand_together_the_most_frequent_first(fresh_api: ServedApi) -> None:
    for code in ("out_of_memory", *["source_not_finite"] * 4):
        fail(fresh_api, code)
    groups = grouped(fresh_api.jobs.list(status="failed").jobs)
    assert [(group.code, group.count, len(group.merges)) for group in groups] == [
        ("source_not_finite", 4, 3),
        ("out_of_memory", 1, 1),
    ]


def test_everybody_sees_their_own_and_an_admin_everything(guarded: GuardedApi) -> None:
    hers, his = guarded.served.running(owner="alice").id, guarded.served.running(owner="bob").id
    failed = fail(guarded.served, "internal", owner="bob")
    alice, admin = signed_in(guarded, "alice"), signed_in(guarded, "admin")
    for path in ("/ui", "/ui/merges", "/ui/merges?owner=bob"):
        page = alice.open(path).text
        assert hers in page and his not in page and failed not in page
    assert all(one in admin.open("/ui").text for one in (hers, his, failed))
    only_bobs = admin.open("/ui/merges?owner=bob").text
    assert his in only_bobs and hers not in only_bobs


def test_the_list_is_filtered_and_read_page_by_page(fresh_api: ServedApi) -> None:
    ids = [fresh_api.queued(labels={"team": f"<b>{number}"}).id for number in range(60)]
    failed = fail(fresh_api, "out_of_memory", method="linear")
    browser = Browser(fresh_api.url)
    page = browser.open("/ui/merges").text
    assert "team=&lt;b&gt;59" in page and "<b>59" not in page
    found = re.findall(r'<th scope="row"><a class="mono" href="/ui/merges/([^"]+)"', page)
    older = re.search(r'href="(\?cursor=[^"]+)" rel="next"', page)
    assert older is not None
    rest = browser.open(f"/ui/merges{older[1]}").text
    found += re.findall(r'<th scope="row"><a class="mono" href="/ui/merges/([^"]+)"', rest)
    assert found == [failed, *reversed(ids)] and "Newest" in rest and 'rel="next"' not in rest
    for query in ("status=failed", "method=linear", "status=failed&method=linear"):
        page = browser.open(f"/ui/merges?{query}").text
        assert failed in page and ids[0] not in page and "All merges" in page
    assert "No merge matches" in browser.open("/ui/merges?status=succeeded").text
    assert ids[59] in browser.open("/ui/merges?status=unfinished").text
    for bad in ("status=no", "cursor=no", "method=NO"):
        assert browser.open(f"/ui/merges?{bad}").status_code == 422


def test_a_recipe_is_planned_and_then_submitted_once(fresh_api: ServedApi) -> None:
    browser = Browser(fresh_api.url)
    browser.open("/ui/new")
    fields = {"recipe": RECIPE_YAML, "labels": "team=search\r\nnight = yes", "priority": "5", "pinned": "true"}
    planned = browser.send("/ui/new", **fields, action="plan")
    assert planned.status_code == 200 and "The recipe is sound: ties" in text_of(planned.text)
    assert not fresh_api.jobs.list().jobs, "nothing is queued by a plan"
    assert "team=search" in planned.text, "the form is as it was"
    browser.http.follow_redirects = False
    places = {browser.http.post("/ui/new", data={**fields, "action": "submit", "once": "a" * 32}).headers["location"]}
    places |= {browser.http.post("/ui/new", data={**fields, "action": "submit", "once": "a" * 32}).headers["location"]}
    (job,) = fresh_api.jobs.list().jobs
    assert places == {f"/ui/merges/{job.id}"}
    assert (job.labels, job.priority, job.pinned) == ({"team": "search", "night": "yes"}, 5, True)


def test_problems_stand_beside_the_lines_that_they_belong_to(fresh_api: ServedApi) -> None:
    browser = Browser(fresh_api.url)
    browser.open("/ui/new")
    recipe = "base_model: models:smollm2-135m-instruct\nmerge_method: tiess\nmodels:\n  - adapter: models:<nowhere>\n"
    answer = browser.send("/ui/new", recipe=recipe, queue="NO", action="submit")
    assert answer.status_code == 422 and not fresh_api.jobs.list().jobs
    (line,) = re.findall(r'<li class="wrong">(.*?)</li>', answer.text)
    assert line.startswith("merge_method: tiess") and "unknown_method" in line
    assert "<code>queue</code>" in answer.text and "&lt;nowhere&gt;" in answer.text and "<nowhere>" not in answer.text
    answer = browser.send("/ui/new", recipe=recipe.replace("tiess", "ties"), queue="default", action="plan")
    (line,) = re.findall(r'<li class="wrong">(.*?)</li>', answer.text)
    assert "adapter: models:" in line and "source_not_found" in line
    answer = browser.send("/ui/new", recipe="a: [", action="plan")
    assert answer.status_code == 422 and "recipe_syntax" in answer.text


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"labels": "team"}, "labels"), ({"labels": "=x"}, "labels"), ({"priority": "high"}, "priority")],
)
def test_what_is_wrong_with_the_form_itself_is_told(fresh_api: ServedApi, fields: dict[str, str], where: str) -> None:
    browser = Browser(fresh_api.url)
    browser.open("/ui/new")
    answer = browser.send("/ui/new", recipe=RECIPE_YAML, action="submit", **fields)
    assert answer.status_code == 422 and f"<code>{where}</code>" in answer.text
    assert not fresh_api.jobs.list().jobs


def test_a_form_may_begin_with_an_earlier_merge_of_the_caller(guarded: GuardedApi) -> None:
    sent = {"recipe": RECIPE_YAML, "queue": "large", "labels": {"team": "search"}}
    job = guarded.send("alice", "post", "/merges", json=sent).json()
    page = signed_in(guarded, "alice").open(f"/ui/new?like={job['id']}").text
    assert 'value="large"' in page and "team=search" in page and "models:adapters/sql" in page
    assert signed_in(guarded, "bob").open(f"/ui/new?like={job['id']}").status_code == 404


def test_only_a_key_that_may_merge_has_the_form(guarded: GuardedApi) -> None:
    answer = signed_in(guarded, "reader").open("/ui/new")
    assert answer.status_code == 403 and "scope_merge_required" in answer.text
