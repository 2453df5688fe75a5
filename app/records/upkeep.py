"""What the janitor asks of the database: jobs whose worker is gone, doorbells to press, leftovers to sweep.

Everything here is idempotent and safe in any number of processes at once: candidates are found without locks, and
each is taken in its own transaction, only if it is still a candidate under the lock. What only the janitor sees
(``rung_at``, ``swept``) leaves ``version`` alone: no reader's copy is out of date for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, exists, func, or_, select, tuple_, update

from app.errors import MergeyardError
from app.records import removal, rows, transitions
from app.records.database import Database, clock
from app.records.job import JanitorReport, Job, Ring, Status
from app.records.key import Caller
from app.records.tables import IS_HELD, IS_QUEUED, aliases, artifacts, jobs, merge_sources, shards

JANITOR = Caller(owner="service:janitor")  # in the audit
BATCH = 200  # rows of each kind in one round; the next round goes on
# A deleted job's hidden row stays this long: by it the files of an attempt that wakes up late are known as strays.
TOMBSTONE_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a job may have in the store: the ``keys`` it names, and all of the attempt (a token) that is ``writing``."""

    keys: frozenset[str]
    writing: str | None
    finished: bool


class Upkeep:
    """The janitor's statements on ``database``."""

    def __init__(self, database: Database, *, retry_seconds: float = 0.0) -> None:
        """``retry_seconds`` as in ``Jobs``."""
        self.database = database
        self._retry_seconds = retry_seconds

    def round(self, *, ring_after: float = 10.0, stalled_after: float = 3600.0) -> JanitorReport:
        """Take jobs from dead or stalled workers, and find the doorbells to press.

        A worker is dead when its lease ran out, stalled when its job did not move for ``stalled_after`` seconds. To
        press are the doorbells of what was requeued, once its pause is over, and of what has been queued for
        ``ring_after`` seconds without being rung.
        """
        ended: dict[Status, list[str]] = {Status.QUEUED: [], Status.FAILED: [], Status.CANCELLED: []}
        rings: list[Ring] = []
        for job_id in self._suspects(stalled_after):
            if (job := self._lose(job_id, stalled_after)) is not None:
                ended[job.status].append(job.id)
                if job.status is Status.QUEUED and job.retry_at is None:
                    rings.append(rows.ring(job))
        rings += self._stale(ring_after)
        return JanitorReport(
            ring=tuple(rings),
            requeued=tuple(ended[Status.QUEUED]),
            failed=tuple(ended[Status.FAILED]),
            cancelled=tuple(ended[Status.CANCELLED]),
        )

    def expire(self) -> list[Job]:
        """Delete the merges whose time is over, at most ``BATCH``, but for what an alias or an unfinished job needs.

        The jobs as they were. One that is needed goes when it no longer is.
        """
        with self.database.read() as connection:
            over = _over(clock(connection))
            found = connection.scalars(select(jobs.c.id).where(over).order_by(jobs.c.expires_at).limit(BATCH)).all()
        return [job for job_id in found if (job := self._expire(job_id)) is not None]

    def waiting(self, queue: str) -> int:
        """How many jobs wait in ``queue`` for nothing but a worker."""
        waiting = select(func.count()).where(IS_QUEUED, jobs.c.queue == queue)
        with self.database.read() as connection:
            return connection.execute(waiting.where(rows.may_start(clock(connection)))).scalar_one()

    def unswept(self, *, after: Job | None = None) -> list[Job]:
        """Finished jobs whose leftover files are still to be swept from the store.

        A deleted one comes twice: at once, and for the last time when its row has stayed for TOMBSTONE_SECONDS. The
        oldest first, at most ``BATCH``, from the one that follows ``after``.
        """
        order = (jobs.c.created_at, jobs.c.id)
        with self.database.read() as connection:
            found: dict[str, Job] = {}
            # One after the other: each has an index of few rows, which an OR of both would leave unused.
            for wanted in (and_(jobs.c.finished_at.is_not(None), ~jobs.c.swept), _forgotten(clock(connection))):
                following = [] if after is None else [tuple_(*order) > tuple_(after.created_at, after.id)]
                statement = select(jobs).where(wanted, *following).order_by(*order).limit(BATCH)
                for row in connection.execute(statement):
                    found[row.id] = rows.read_job(row)
        return sorted(found.values(), key=lambda one: (one.created_at, one.id))[:BATCH]

    def set_swept(self, job_id: str) -> None:
        """The store holds nothing of the job but what is published. A row deleted long enough ago goes now."""
        with self.database.write() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == job_id, _forgotten(clock(connection))))
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(swept=True))

    def claims(self, job_id: str) -> Claims | None:
        """What the job may have in the store; None for an id that these records do not know."""
        recorded = select(shards.c.key).where(shards.c.job_id == job_id)
        with self.database.read() as connection:
            row = connection.execute(select(jobs, _gone.label("gone")).where(jobs.c.id == job_id)).one_or_none()
            if row is None:
                return None
            job = rows.read_job(row)
            if not job.status.finished:
                keys = frozenset(connection.scalars(recorded))
            else:
                keys = frozenset() if row.gone else job.artifact_keys
        return Claims(keys=keys, writing=job.lease_token, finished=job.status.finished)

    def _suspects(self, stalled_after: float) -> Sequence[str]:
        with self.database.read() as connection:
            dead = _dead(clock(connection), stalled_after)
            return connection.scalars(select(jobs.c.id).where(dead).limit(BATCH)).all()

    def _lose(self, job_id: str, stalled_after: float) -> Job | None:
        with self.database.write() as connection:
            now = clock(connection)
            still_dead = select(jobs).where(jobs.c.id == job_id, _dead(now, stalled_after))
            row = connection.execute(still_dead.with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            job = rows.read_job(row)
            expired = job.lease_expires_at is not None and job.lease_expires_at < now
            reason = "lease_expired" if expired else "stalled"
            return rows.apply(connection, job, transitions.lose(job, now, reason=reason, pause=self._retry_seconds))

    def _expire(self, job_id: str) -> Job | None:
        with self.database.write() as connection:
            now = clock(connection)
            still = select(jobs).where(jobs.c.id == job_id, _over(now)).with_for_update(skip_locked=True)
            row = connection.execute(still).one_or_none()
            if row is None:
                return None
            job = rows.read_job(row)
            try:
                change, data = transitions.expire(job, now), {"owner": job.owner}
                removal.remove(connection, job, change, "expired", by=JANITOR, data=data)
            except MergeyardError as error:
                if error.code != "merge_in_use":  # since a moment ago
                    raise
                return None
            return job

    def _stale(self, ring_after: float) -> list[Ring]:
        with self.database.read() as connection:  # most rounds find nothing, and hold SQLite's lock for nothing
            now = clock(connection)
            rung = func.min(jobs.c.rung_at)
            waiting = select(jobs.c.queue).where(_stale(now, ring_after)).group_by(jobs.c.queue).order_by(rung)
            queues = connection.scalars(waiting.limit(BATCH)).all()
        found: list[Row[Any]] = []
        # In turn: a queue that no worker serves must keep neither its own later jobs nor other queues waiting.
        for queues_left, queue in zip(range(len(queues), 0, -1), queues, strict=True):
            share = (BATCH - len(found)) // queues_left
            found += self._press(queue, share, ring_after)
        return [rows.ring(row) for row in sorted(found, key=lambda row: (row.created_at, row.id))]

    def _press(self, queue: str, most: int, ring_after: float) -> Sequence[Row[Any]]:
        """Mark the doorbells of ``queue`` that were pressed the longest ago, at most ``most``."""
        with self.database.write() as connection:
            now = clock(connection)
            stale = and_(_stale(now, ring_after), jobs.c.queue == queue)
            longest = select(jobs.c.id).where(stale).order_by(jobs.c.rung_at, jobs.c.created_at).limit(most)
            chosen = connection.scalars(longest.with_for_update(skip_locked=True)).all()
            returned = (jobs.c.id, jobs.c.queue, jobs.c.priority, jobs.c.created_at)
            pressed = update(jobs).where(jobs.c.id.in_(chosen)).values(rung_at=now).returning(*returned)
            return connection.execute(pressed).all()


# Of a deleted job, that nobody has its artifact: nothing of it is kept, and nothing will be again.
_gone = and_(jobs.c.deleted_at.is_not(None), ~exists().where(artifacts.c.id == jobs.c.id))


def _forgotten(now: datetime) -> ColumnElement[bool]:
    return and_(jobs.c.deleted_at < now - timedelta(seconds=TOMBSTONE_SECONDS), _gone)


def _over(now: datetime) -> ColumnElement[bool]:
    """That a job has expired and nobody needs it."""
    reader = jobs.alias()
    reading = select(reader.c.id).join(merge_sources, merge_sources.c.job_id == reader.c.id)
    return and_(
        jobs.c.expires_at <= now,
        jobs.c.pinned.is_(False),
        jobs.c.deleted_at.is_(None),
        ~exists().where(aliases.c.merge == jobs.c.id),
        ~reading.where(merge_sources.c.merge == jobs.c.id, reader.c.finished_at.is_(None)).exists(),
    )


def _stale(now: datetime, ring_after: float) -> ColumnElement[bool]:
    due = or_(jobs.c.rung_at <= now - timedelta(seconds=ring_after), jobs.c.retry_at > jobs.c.rung_at)
    return and_(IS_QUEUED, rows.may_start(now), due)


def _dead(now: datetime, stalled_after: float) -> ColumnElement[bool]:
    return and_(
        IS_HELD,
        or_(
            jobs.c.lease_expires_at < now,
            jobs.c.progress_at < now - timedelta(seconds=stalled_after),
        ),
    )
