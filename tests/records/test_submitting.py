"""Idempotency keys, ids, pages and filters, on both databases."""

from __future__ import annotations

import re
import threading

import pytest

from app.errors import MergeyardError
from app.records.job import Idempotency, Job, Status
from app.records.jobs import Jobs
from tests.records.submitting import claimed, new_job

KEY = Idempotency(owner="me", key="k", request_hash="1" * 64)


def test_the_same_key_and_request_give_the_earlier_job(jobs: Jobs) -> None:
    assert jobs.earlier(KEY) is None
    first, created = jobs.submit(new_job(), idempotency=KEY)
    again, created_again = jobs.submit(new_job(), idempotency=KEY)
    assert (created, created_again) == (True, False)
    assert again == first == jobs.earlier(KEY)
    assert len(jobs.list().jobs) == 1


def test_the_same_key_with_another_request_is_refused(jobs: Jobs) -> None:
    jobs.submit(new_job(), idempotency=KEY)
    other = Idempotency(owner="me", key="k", request_hash="2" * 64)
    for ask in (lambda: jobs.submit(new_job(), idempotency=other), lambda: jobs.earlier(other)):
        with pytest.raises(MergeyardError) as caught:
            ask()
        assert caught.value.code == "idempotency_mismatch"
    assert len(jobs.list().jobs) == 1


def test_keys_of_two_owners_do_not_meet(jobs: Jobs) -> None:
    mine, _ = jobs.submit(new_job(), idempotency=KEY)
    theirs, created = jobs.submit(new_job(), idempotency=Idempotency(owner="you", key="k", request_hash="2" * 64))
    assert created and theirs.id != mine.id


def test_of_many_submissions_with_one_key_one_makes_the_job(jobs: Jobs) -> None:
    start, results = threading.Barrier(8), []

    def submit() -> None:
        start.wait()
        results.append(jobs.submit(new_job(), idempotency=KEY))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len({job.id for job, _ in results}) == 1
    assert sum(created for _, created in results) == 1
    assert len(jobs.list().jobs) == 1


def test_a_deleted_jobs_key_may_be_used_again(jobs: Jobs) -> None:
    job, _ = jobs.submit(new_job(), idempotency=KEY)
    jobs.request_cancel(job.id)
    jobs.delete(job.id)
    assert jobs.earlier(KEY) is None
    _, created = jobs.submit(new_job(), idempotency=KEY)
    assert created


def test_ids_sort_by_time_and_fit_hub_names(jobs: Jobs) -> None:
    made = [jobs.submit(new_job())[0] for _ in range(20)]
    assert len({job.id for job in made}) == 20
    assert [job.id[:14] for job in made] == sorted(job.id[:14] for job in made)
    for job in made:
        assert re.fullmatch(r"[\w.-]{1,96}", job.id) and "--" not in job.id and ".." not in job.id
        assert job.id == job.id.lower()


def test_pages_go_from_newest_to_oldest_and_do_not_shift_under_inserts(jobs: Jobs) -> None:
    made = [jobs.submit(new_job())[0].id for _ in range(7)]
    seen: list[Job] = []
    cursor = None
    while True:
        page = jobs.list(limit=3, cursor=cursor)
        seen += page.jobs
        jobs.submit(new_job())  # somebody submits while somebody pages
        if (cursor := page.next_cursor) is None:
            break
    order = [(job.created_at, job.id) for job in seen]
    assert order == sorted(order, reverse=True)
    assert sorted(job.id for job in seen) == sorted(made)


def test_a_full_last_page_has_no_next(jobs: Jobs) -> None:
    for _ in range(4):
        jobs.submit(new_job())
    page = jobs.list(limit=2)
    assert len(page.jobs) == 2 and page.next_cursor
    assert jobs.list(limit=2, cursor=page.next_cursor).next_cursor is None


@pytest.mark.parametrize("cursor", ["", "x", "%%%", "MjAyNg", "bm90fGE"])
def test_a_cursor_we_never_gave_is_refused(jobs: Jobs, cursor: str) -> None:
    with pytest.raises(MergeyardError) as caught:
        jobs.list(cursor=cursor)
    assert (caught.value.code, caught.value.where) == ("request_invalid", "cursor")


def test_filters(jobs: Jobs) -> None:
    ties, _ = jobs.submit(new_job())
    linear, _ = jobs.submit(new_job(method="linear"))
    running = claimed(jobs)
    assert [job.id for job in jobs.list(status="running").jobs] == [running.id]
    assert [job.id for job in jobs.list(method="linear").jobs] == [linear.id]
    assert [job.id for job in jobs.list(method="linear", status=[Status.QUEUED, "running"]).jobs] == [linear.id]
    assert jobs.list(status="failed").jobs == ()
    assert {job.id for job in jobs.list().jobs} == {ties.id, linear.id, running.id}


def test_events_are_read_from_where_one_left_off(jobs: Jobs) -> None:
    job = claimed(jobs)
    jobs.request_cancel(job.id)
    everything = jobs.events(job.id)
    assert [event.type for event in everything] == ["submitted", "claimed", "cancel_requested"]
    assert jobs.events(job.id, after=everything[0].id) == everything[1:]
    assert jobs.events(job.id, limit=1) == everything[:1]
    assert [event.id for event in everything] == sorted({event.id for event in everything})
