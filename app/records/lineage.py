"""Where a merge comes from and what came of it: its sources, theirs, later merges that read it, and its aliases.

A merge's sources stand in its recipe. Those that read it are found by ``merge_sources``, those that have its result by
the artifact that they share. All of them are of one owner, because recipes can name no other's merges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import Connection, select

from app.errors import MergeyardError
from app.recipe import parse_recipe
from app.recipe.roles import Named, Role, named_sources
from app.records import rows
from app.records.database import Database
from app.records.job import Job, Kind
from app.records.key import Caller
from app.records.tables import aliases, jobs, merge_sources

STEPS = 4  # merges of merges that are followed, each way
MOST = 60  # merges in one lineage, besides the one that it is of
MERGE = "merge:"

Relation = Role | Literal["result", "alias"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """What the merge is related to. ``name``: a reference as recipes write it; of an alias its own name.

    ``merge`` is the merge that it is, None for files, for aliases and for a merge that was deleted.
    """

    name: str
    kind: Role | Literal["merge", "alias"]
    merge: Job | None = None


@dataclass(frozen=True, slots=True)
class Tie:
    """``target`` has ``source`` as its base, model, adapter or tokenizer, has its result, or is an alias for it."""

    source: str
    target: str
    relation: Relation


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The relatives by name, in the order they were found, the merge itself (``subject``) first, and their ties.

    ``cut``: there are more of them than were followed.
    """

    subject: str
    relatives: Mapping[str, Relative]
    ties: tuple[Tie, ...]
    cut: bool


class Lineages:
    """Lineages of the merges in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def of(self, job_id: str, *, by: Caller | None = None) -> Lineage:
        """``not_found`` for a merge that ``by`` does not see, as in ``Jobs.get``."""
        with self.database.read() as connection:
            job = rows.get(connection, job_id, by=by)
            found = _Found(job.owner)
            found.add_merge(job_id, job)
            _ancestors(connection, found, job)
            _sharers(connection, found, job)
            _descendants(connection, found, job)
            _aliases(connection, found)
        return Lineage(
            subject=MERGE + job_id, relatives=found.relatives, ties=tuple(dict.fromkeys(found.ties)), cut=found.cut
        )


@dataclass(slots=True)
class _Found:
    owner: str
    relatives: dict[str, Relative] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    cut: bool = False

    def add_merge(self, job_id: str, job: Job | None) -> None:
        name = MERGE + job_id
        self.relatives.setdefault(name, Relative(name=name, kind="merge", merge=job))

    def knows(self, job_id: str) -> bool:
        return MERGE + job_id in self.relatives

    def room_for(self, ids: Iterable[str]) -> list[str]:
        """Those of the merges that are new, as far as the lineage takes more."""
        new = [job_id for job_id in dict.fromkeys(ids) if not self.knows(job_id)]
        merges = sum(relative.kind == "merge" for relative in self.relatives.values())
        taken = new[: max(0, MOST + 1 - merges)]
        self.cut = self.cut or len(taken) < len(new)
        return taken


def _ancestors(connection: Connection, found: _Found, job: Job) -> None:
    generation = [job]
    for _ in range(STEPS):
        wanted = []
        for child in generation:
            for named in _sources(child):
                if named.reference.startswith(MERGE):
                    wanted.append(named.reference.removeprefix(MERGE))
                else:
                    found.relatives.setdefault(named.reference, Relative(name=named.reference, kind=named.role))
        taken = found.room_for(wanted)
        parents = _jobs(connection, found.owner, taken)
        for job_id in taken:
            found.add_merge(job_id, parents.get(job_id))
        for child in generation:
            for named in _sources(child):
                if named.reference in found.relatives:
                    found.ties.append(Tie(named.reference, MERGE + child.id, named.role))
        generation = list(parents.values())
    found.cut = found.cut or any(
        named.reference not in found.relatives for parent in generation for named in _sources(parent)
    )


def _sharers(connection: Connection, found: _Found, job: Job) -> None:
    """The merges that have the same result: one of them made it."""
    if job.artifact_id is None:
        return
    statement = (
        select(jobs)
        .where(jobs.c.artifact_id == job.artifact_id, jobs.c.owner == job.owner, jobs.c.deleted_at.is_(None))
        .order_by(jobs.c.created_at, jobs.c.id)
        .limit(MOST + 1)
    )
    sharers = {row.id: rows.read_job(row) for row in connection.execute(statement)}
    if len(sharers) < 2 and not job.reused:
        return
    maker = job.artifact_id
    for job_id in found.room_for([maker, *sharers]):
        found.add_merge(job_id, sharers.get(job_id))
    found.ties.extend(
        Tie(MERGE + maker, MERGE + job_id, "result") for job_id in sharers if job_id != maker and found.knows(job_id)
    )


def _descendants(connection: Connection, found: _Found, job: Job) -> None:
    generation = [job.id]
    for step in range(STEPS + 1):
        statement = (
            select(jobs)
            .join(merge_sources, merge_sources.c.job_id == jobs.c.id)
            .where(
                merge_sources.c.merge.in_(generation),
                jobs.c.owner == found.owner,
                jobs.c.kind == Kind.MERGE,
                jobs.c.deleted_at.is_(None),
            )
            .order_by(jobs.c.created_at, jobs.c.id)
            .limit(MOST + 1)
        )
        readers = {row.id: rows.read_job(row) for row in connection.execute(statement)}
        if step == STEPS:
            found.cut = found.cut or any(not found.knows(job_id) for job_id in readers)
            return
        taken = found.room_for(readers)
        for job_id in taken:
            found.add_merge(job_id, readers[job_id])
        among = {MERGE + job_id for job_id in generation}
        found.ties.extend(
            Tie(named.reference, MERGE + reader.id, named.role)
            for reader in readers.values()
            if found.knows(reader.id)
            for named in _sources(reader)
            if named.reference in among
        )
        if not taken:
            return
        generation = taken


def _aliases(connection: Connection, found: _Found) -> None:
    merges = [relative.merge.id for relative in found.relatives.values() if relative.merge]
    statement = (
        select(aliases.c.name, aliases.c.merge)
        .where(aliases.c.merge.in_(merges), aliases.c.owner == found.owner)
        .order_by(aliases.c.name)
        .limit(MOST + 1)
    )
    pointing = connection.execute(statement).all()
    found.cut = found.cut or len(pointing) > MOST
    for row in pointing[:MOST]:
        name = f"aliases/{row.name}"  # as hub clients ask for it; no reference is written so
        found.relatives.setdefault(name, Relative(name=name, kind="alias"))
        found.ties.append(Tie(MERGE + row.merge, name, "alias"))


def _jobs(connection: Connection, owner: str, ids: Collection[str]) -> dict[str, Job]:
    """Those of the merges that are the owner's and there, in the order they were asked for."""
    statement = select(jobs).where(jobs.c.id.in_(ids), jobs.c.owner == owner, jobs.c.deleted_at.is_(None))
    there = {row.id: rows.read_job(row) for row in connection.execute(statement)} if ids else {}
    return {job_id: there[job_id] for job_id in ids if job_id in there}


def _sources(job: Job) -> tuple[Named, ...]:
    """Of a recipe that an earlier version took and this one does not: none."""
    try:
        return named_sources(parse_recipe(job.resolved))
    except MergeyardError:
        return ()
