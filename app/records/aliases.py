"""Aliases: names that point to merges, and the merges that each has pointed to.

An owner's aliases are its own, and point to its own merges. The merge that an alias points to cannot be deleted: both
sides lock its row, so one of them sees the other. A merge that the alias has left can be; it stays in the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.artifacts.manifest import commit_of
from app.errors import MergeyardError
from app.records import audit, rows
from app.records.database import Database, clock
from app.records.job import Job
from app.records.key import Caller
from app.records.tables import alias_moves, aliases, jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """``merge`` is what it points to now, ``commit`` that artifact's revision (40 hex)."""

    owner: str
    name: str
    merge: str
    commit: str
    created_at: datetime
    moved_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """An alias was pointed to ``merge``, with the key ``key_id`` (None: nobody needed one yet)."""

    merge: str
    commit: str
    at: datetime
    key_id: str | None


class Aliases:
    """Aliases in ``database``. One that the caller's owner does not have raises MergeyardError ``not_found``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def point(self, name: str, merge: str, *, by: Caller) -> tuple[Alias, bool]:
        """Point the alias at a merge, and whether that made it. Pointing where it points already changes nothing.

        Raises ``not_found`` for a merge that is not the caller's owner's, ``conflict`` for one without an artifact.
        """
        try:
            return self._point(name, merge, by)
        except IntegrityError:  # two first requests at once; on PostgreSQL both find nothing
            return self._point(name, merge, by)

    def get(self, name: str, *, by: Caller) -> Alias:
        with self.database.read() as connection:
            return _get(connection, name, by)

    def list(self, *, by: Caller) -> Sequence[Alias]:
        """The caller's owner's, by name."""
        statement = select(aliases).where(aliases.c.owner == by.owner).order_by(aliases.c.name)
        with self.database.read() as connection:
            return [Alias(**row._mapping) for row in connection.execute(statement)]

    def history(self, name: str, *, by: Caller, limit: int) -> Sequence[Move]:
        """What the alias has pointed to, the newest first."""
        statement = (
            select(alias_moves.c.merge, alias_moves.c.commit, alias_moves.c.at, alias_moves.c.key_id)
            .where(alias_moves.c.owner == by.owner, alias_moves.c.name == name)
            .order_by(alias_moves.c.id.desc())
            .limit(limit)
        )
        with self.database.read() as connection:
            return [Move(**row._mapping) for row in connection.execute(statement)]

    def delete(self, name: str, *, by: Caller) -> None:
        """Forget the alias and where it has pointed. The merges stay."""
        with self.database.write() as connection:
            alias = _get(connection, name, by, lock=True)
            connection.execute(delete(aliases).where(aliases.c.owner == by.owner, aliases.c.name == name))
            audit.record(connection, by, "alias_deleted", alias.merge, {"alias": name})

    def target(self, name: str, *, by: Caller) -> Job:
        """The merge that the alias points to."""
        statement = (
            select(jobs)
            .join(aliases, aliases.c.merge == jobs.c.id)
            .where(aliases.c.owner == by.owner, aliases.c.name == name)
        )
        with self.database.read() as connection:
            row = connection.execute(statement).one_or_none()
        if row is None:
            raise _unknown()
        return rows.read_job(row)

    def earlier(self, name: str, commit: str, *, by: Caller) -> Job | None:
        """The merge of this commit that the alias points to or has pointed to; None where that is deleted."""
        statement = (
            select(jobs)
            .join(alias_moves, alias_moves.c.merge == jobs.c.id)
            .where(alias_moves.c.owner == by.owner, alias_moves.c.name == name, alias_moves.c.commit == commit)
            .where(jobs.c.deleted_at.is_(None))
            .order_by(alias_moves.c.id.desc())
            .limit(1)
        )
        with self.database.read() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else rows.read_job(row)

    def _point(self, name: str, merge: str, by: Caller) -> tuple[Alias, bool]:
        with self.database.write() as connection:
            # An admin's alias, too, leads to its own owner's merges alone: whoever shares its keys reads by it.
            job = rows.get(connection, merge, by=replace(by, scopes=frozenset()), lock=True)
            if job.artifact is None:
                message = f"The merge is {job.status}: an alias points to a succeeded one."
                raise MergeyardError("conflict", message, where="merge")
            now = clock(connection)
            target = {"merge": merge, "commit": commit_of(job.artifact["manifest_sha256"]), "moved_at": now}
            found = _find(connection, name, by.owner, lock=True)
            if found is not None and found.merge == merge:
                return found, False
            if found is None:
                values = {"owner": by.owner, "name": name, "created_at": now, **target}
                connection.execute(insert(aliases).values(values))
            else:
                moved = update(aliases).where(aliases.c.owner == by.owner, aliases.c.name == name)
                connection.execute(moved.values(target))
            connection.execute(
                insert(alias_moves).values(
                    owner=by.owner, name=name, merge=merge, commit=target["commit"], at=now, key_id=by.key_id
                )
            )
            before = found.merge if found else None
            audit.record(connection, by, "alias_pointed", merge, {"alias": name, "before": before})
            return _get(connection, name, by), found is None


def check_unaliased(connection: Connection, job_id: str) -> None:
    """Raise ``merge_in_use`` while an alias points to the job, whose row the caller has locked."""
    names = connection.scalars(
        select(aliases.c.name).where(aliases.c.merge == job_id).order_by(aliases.c.name).limit(4)
    ).all()
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        message = f"An alias points to this merge ({shown}): point it elsewhere or delete it first (/aliases)."
        raise MergeyardError("merge_in_use", message)


def _get(connection: Connection, name: str, by: Caller, *, lock: bool = False) -> Alias:
    found = _find(connection, name, by.owner, lock=lock)
    if found is None:
        raise _unknown()
    return found


def _find(connection: Connection, name: str, owner: str, *, lock: bool) -> Alias | None:
    statement = select(aliases).where(aliases.c.owner == owner, aliases.c.name == name)
    row = connection.execute(statement.with_for_update() if lock else statement).one_or_none()
    return None if row is None else Alias(**row._mapping)


def _unknown() -> MergeyardError:
    return MergeyardError("not_found", "There is no alias of this name; GET /aliases lists yours.")
