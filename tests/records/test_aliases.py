"""Aliases under concurrency, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError

from app.errors import MergeyardError
from app.records.aliases import Aliases
from app.records.audit import Audit
from app.records.database import Database
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.key import Caller
from app.records.tables import jobs as job_rows
from tests.records.submitting import ARTIFACT, claimed

ME = Caller(owner="me", key_id="k")


@pytest.fixture
def aliases(database: Database) -> Aliases:
    return Aliases(database)


def published(jobs: Jobs, digit: str = "a") -> Job:
    job = claimed(jobs, owner="me")
    return jobs.publish(job.id, job.lease_token or "", {**ARTIFACT, "manifest_sha256": digit * 64})


def at_once(*calls: Callable[[], object]) -> list[object]:
    """What each call returned, or the code of its MergeyardError."""
    answers: list[object] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(place: int) -> None:
        start.wait()
        try:
            answers[place] = calls[place]()
        except MergeyardError as error:
            answers[place] = error.code

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_no_merge_is_deleted_under_an_alias_whoever_comes_first(jobs: Jobs, aliases: Aliases) -> None:
    ends = set()
    for number in range(12):
        job, name = published(jobs), f"alias-{number}"
        calls = [lambda job=job, name=name: aliases.point(name, job.id, by=ME), lambda job=job: jobs.delete(job.id)]
        pointed, deleted = at_once(*calls) if number % 2 else reversed(at_once(*reversed(calls)))
        if pointed == "not_found":
            assert isinstance(deleted, Job)
            with pytest.raises(MergeyardError):
                aliases.get(name, by=ME)
        else:
            assert deleted == "merge_in_use"
            assert aliases.target(name, by=ME).id == job.id
        ends.add(deleted == "merge_in_use")
    assert ends  # which of them came first is the machine's to say


def test_of_two_that_make_an_alias_one_makes_it_and_the_other_moves_it(jobs: Jobs, aliases: Aliases) -> None:
    for number in range(6):
        name, merges = f"alias-{number}", [published(jobs, digit).id for digit in "ab"]
        answers = at_once(*(lambda merge=merge, name=name: aliases.point(name, merge, by=ME) for merge in merges))
        assert sorted(created for _, created in answers) == [False, True]  # type: ignore[misc]
        moves = aliases.history(name, by=ME, limit=10)
        assert {move.merge for move in moves} == set(merges)
        assert aliases.get(name, by=ME).merge == moves[0].merge, "the last move is what it points to"


def test_the_same_pointed_twice_at_once_is_one_move(jobs: Jobs, aliases: Aliases, database: Database) -> None:
    job = published(jobs)
    answers = at_once(*[lambda: aliases.point("one", job.id, by=ME)] * 4)
    assert sum(created for _, created in answers) == 1  # type: ignore[misc]
    assert len(aliases.history("one", by=ME, limit=10)) == 1
    assert len(Audit(database).list(action="alias_pointed")) == 1


def test_the_database_itself_keeps_the_row_of_a_merge_that_is_pointed_to(
    jobs: Jobs, aliases: Aliases, database: Database
) -> None:
    job = published(jobs)
    aliases.point("one", job.id, by=ME)
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(delete(job_rows).where(job_rows.c.id == job.id))
    aliases.delete("one", by=ME)
    assert aliases.list(by=ME) == []
    assert isinstance(jobs.delete(job.id), Job)
