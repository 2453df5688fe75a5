"""Where a merge comes from, and what came of it."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from app.errors import MergeyardError
from app.records import lineage as module
from app.records.aliases import Aliases
from app.records.database import Database
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.key import Caller, Scope
from app.records.lineage import Lineage, Lineages, Tie
from app.records.tables import jobs as rows
from tests.records.submitting import ARTIFACT, new_job, wait_a_moment

ALICE, BOB = Caller(owner="alice", scopes=frozenset({Scope.READ})), Caller(owner="bob", scopes=frozenset({Scope.READ}))


class Family:
    """Merges of alice's, made in the records alone."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def submitted(self, *sources: str, base: str = "models:llama", reuse: str | None = None, **changes: Any) -> Job:
        recipe = {
            "base_model": base,
            "merge_method": "ties",
            "models": [
                {"model" if source.startswith("merge:") else "adapter": source}
                for source in sources or ("models:sql", "models:json")
            ],
        }
        read = {name.removeprefix("merge:") for name in (base, *sources) if name.startswith("merge:")}
        wait_a_moment(self.jobs.database)  # so that they are in order
        new = new_job(**{"owner": "alice", "resolved": recipe, "merges": read, **changes})
        return self.jobs.submit(new, reuse=reuse)[0]

    def merged(self, *sources: str, **changes: Any) -> Job:
        job = self.submitted(*sources, **changes)
        claimed = self.jobs.claim(job.id, lease_seconds=60)
        assert claimed is not None
        return self.jobs.publish(job.id, claimed.lease_token or "", ARTIFACT)

    def of(self, job: Job, by: Caller | None = ALICE) -> Lineage:
        return Lineages(self.jobs.database).of(job.id, by=by)


@pytest.fixture
def family(jobs: Jobs) -> Family:
    return Family(jobs)


def name(job: Job) -> str:
    return f"merge:{job.id}"


def test_a_merge_comes_from_its_base_and_its_adapters(family: Family) -> None:
    job = family.merged()
    found = family.of(job)
    assert found.subject == name(job)
    assert {relative.name: relative.kind for relative in found.relatives.values()} == {
        name(job): "merge",
        "models:llama": "base",
        "models:sql": "adapter",
        "models:json": "adapter",
    }
    assert found.ties == (
        Tie("models:llama", name(job), "base"),
        Tie("models:sql", name(job), "adapter"),
        Tie("models:json", name(job), "adapter"),
    )
    assert not found.cut


def test_merges_of_merges_are_followed_both_ways(family: Family) -> None:
    first = family.merged()
    second = family.merged(name(first), "models:chat")
    third = family.submitted(name(second), base=name(first))
    for job in (first, second, third):
        found = family.of(job)
        assert {name(first), name(second), name(third)} <= set(found.relatives)
        assert Tie(name(first), name(second), "model") in found.ties
        assert Tie(name(second), name(third), "model") in found.ties
    assert Tie(name(first), name(third), "base") in family.of(first).ties
    assert "models:chat" in family.of(third).relatives
    assert "models:chat" not in family.of(first).relatives, "what later merges take besides is theirs"
    assert family.of(third).relatives[name(first)].merge == first


def test_a_deleted_source_keeps_its_place_and_loses_its_past(family: Family) -> None:
    first = family.merged("models:old")
    second = family.merged(name(first))
    family.jobs.delete(first.id)
    found = family.of(second)
    assert found.relatives[name(first)].merge is None
    assert Tie(name(first), name(second), "model") in found.ties
    assert "models:old" not in found.relatives


def test_a_deleted_reader_is_gone(family: Family) -> None:
    first = family.merged()
    second = family.merged(name(first))
    family.jobs.delete(second.id)
    assert name(second) not in family.of(first).relatives


def test_merges_with_the_same_result(family: Family) -> None:
    maker = family.merged()
    again = family.submitted(reuse=maker.id)
    third = family.submitted(reuse=maker.id)
    assert again.reused
    for job in (maker, again, third):
        ties = family.of(job).ties
        assert Tie(name(maker), name(again), "result") in ties
        assert Tie(name(maker), name(third), "result") in ties
    family.jobs.delete(maker.id)
    found = family.of(again)
    assert found.relatives[name(maker)].merge is None, "it is hidden, and made what the others have"
    assert Tie(name(maker), name(third), "result") in found.ties


def test_aliases_that_point_to_any_of_them(family: Family, database: Database) -> None:
    first = family.merged()
    second = family.merged(name(first))
    for alias, job in (("production", first), ("next", second)):
        Aliases(database).point(alias, job.id, by=ALICE)
    found = family.of(first)
    assert Tie(name(first), "aliases/production", "alias") in found.ties
    assert Tie(name(second), "aliases/next", "alias") in found.ties
    assert found.relatives["aliases/next"].kind == "alias"


def test_another_owners_merge_is_not_found(family: Family) -> None:
    job = family.merged()
    with pytest.raises(MergeyardError) as refused:
        family.of(job, by=BOB)
    assert refused.value.code == "not_found"


def test_nothing_of_another_owners_is_in_it(family: Family, database: Database) -> None:
    """No recipe can name it, so rows that say otherwise are made by hand here."""
    job = family.merged()
    theirs = family.merged("models:theirs", owner="bob")
    mine = family.merged(name(theirs))  # as no submission could
    family.submitted(name(job), owner="bob")
    with database.write() as connection:
        connection.execute(update(rows).where(rows.c.id == theirs.id).values(artifact_id=job.id))
    found = family.of(job, by=Caller(owner="root", scopes=frozenset({Scope.ADMIN})))
    assert [relative.name for relative in found.relatives.values() if relative.kind == "merge"] == [name(job)]
    found = family.of(mine)
    assert found.relatives[name(theirs)].merge is None
    assert "models:theirs" not in found.relatives


def test_a_long_line_is_cut_and_says_so(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    line = [family.merged()]
    for _ in range(6):
        line.append(family.merged(name(line[-1])))
    found = family.of(line[3])
    assert {relative.merge.id for relative in found.relatives.values() if relative.merge} == {
        job.id for job in line[1:6]
    }
    assert found.cut


def test_as_far_as_it_was_followed_it_is_whole(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    line = [family.merged()]
    for _ in range(2):
        line.append(family.merged(name(line[-1])))
    assert not family.of(line[0]).cut
    assert not family.of(line[1]).cut


def test_a_large_family_is_cut(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    first = family.merged()
    children = [family.submitted(name(first)) for _ in range(5)]
    found = family.of(first)
    assert found.cut
    assert {relative.merge.id for relative in found.relatives.values() if relative.merge} == {
        first.id,
        *(child.id for child in children[:3]),
    }
    ends = {tie.source for tie in found.ties} | {tie.target for tie in found.ties}
    assert ends <= set(found.relatives)


def test_a_recipe_that_this_version_does_not_take_has_no_sources(family: Family) -> None:
    job = family.submitted(resolved={"merge_method": "of_old"})
    assert list(family.of(job).relatives) == [name(job)]
