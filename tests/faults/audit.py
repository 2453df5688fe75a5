"""What must hold when everything has finished, read from the records and the store themselves."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select

from app.artifacts.store import LocalStore
from app.records.database import Database
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.tables import jobs as table
from app.records.upkeep import Upkeep
from app.settings import Settings

SWEPT_SECONDS = 30.0
ENDINGS = {"succeeded", "failed", "cancelled"}


@dataclass
class Audit:
    """The promise's four counts, each to be zero, and what the run was made of."""

    lost: list[str] = field(default_factory=list)
    published_twice: list[str] = field(default_factory=list)
    wrong_bytes: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    happenings: Counter[str] = field(default_factory=Counter)
    adopted: int = 0

    @property
    def zeros(self) -> Mapping[str, int]:
        return {
            "lost": len(self.lost),
            "published twice": len(self.published_twice),
            "wrong digests": len(self.wrong_bytes),
            "left in the store": len(self.left_over),
        }


def audit(settings: Settings, accepted: Mapping[str, str], deleted: set[str]) -> Audit:
    """``accepted``: Idempotency-Key → merge, every 202 that was answered."""
    found, database = Audit(), Database(settings.database)
    try:
        jobs, store = Jobs(database), LocalStore(settings.artifacts)
        with database.read() as connection:
            ids = set(connection.scalars(select(table.c.id).where(table.c.deleted_at.is_(None))))
        found.lost += sorted(set(accepted.values()) - ids - deleted)
        found.published_twice += sorted(ids - set(accepted.values()))  # a repeated POST made another
        keys = {key for job_id in ids for key in _audit_job(found, jobs, store, jobs.get(job_id))}
        found.left_over += _left_over(database, settings, keys)
    finally:
        database.close()
    return found


def _audit_job(found: Audit, jobs: Jobs, store: LocalStore, job: Job) -> set[str]:
    events = [event.type for event in jobs.events(job.id, limit=1000)]
    found.happenings.update(events)
    found.attempts[job.attempt] += 1
    endings = [kind for kind in events if kind in ENDINGS]
    if endings != [str(job.status)]:
        (found.published_twice if len(endings) > 1 else found.lost).append(f"{job.id}: {job.status}, told as {endings}")
    files = [] if job.artifact is None else job.artifact["files"]
    for file in files:
        try:
            holds = hashlib.sha256(store.path(file["key"]).read_bytes()).hexdigest() == file["sha256"]
        except FileNotFoundError:
            holds = False
        if not holds:
            found.wrong_bytes.append(file["key"])
    found.adopted += len({file["key"].split("/")[1] for file in files}) > 1
    return {file["key"] for file in files}


def _left_over(database: Database, settings: Settings, published: set[str]) -> list[str]:
    """Once the janitor has swept: every file in the store, hidden ones too, that no row names."""
    deadline = time.monotonic() + SWEPT_SECONDS
    while True:
        paths = [path for path in settings.artifacts.rglob("*") if path.is_file()]
        left = {path.relative_to(settings.artifacts).as_posix() for path in paths} - published
        if not left and not Upkeep(database).unswept():
            return []
        if time.monotonic() > deadline:
            return sorted(left) or ["rows that were never swept"]
        time.sleep(0.2)
