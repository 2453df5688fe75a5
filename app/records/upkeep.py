"""What the janitor asks of the database: jobs whose worker is gone, doorbells to press, leftovers to sweep.

Everything here is idempotent and safe in any number of processes at once: candidates are found without locks, and
each is taken in its own transaction, only if it is still a candidate under the lock. What only the janitor sees
(``rung_at``, ``swept``) leaves ``version`` alone: no reader's copy is out of date for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, tuple_, update

from app.records import rows, transitions
from app.records.database import Database, clock
from app.records.job import JanitorReport, Job, Ring, Status
from app.records.tables import jobs, shards

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

    def waiting(self, queue: str) -> int:
        """How many jobs wait in ``queue`` for nothing but a worker."""
        waiting = select(func.count()).where(jobs.c.status == Status.QUEUED, jobs.c.queue == queue)
        with self.database.read() as connection:
            return connection.execute(waiting.where(rows.may_start(clock(connection)))).scalar_one()

    def unswept(self, *, after: Job | None = None) -> list[tuple[Job, bool]]:
        """Finished jobs whose leftover files are still to be swept from the store, and whether each was deleted.

        A deleted one comes twice: at once, and for the last time when its row has stayed for TOMBSTONE_SECONDS. The
        oldest first, at most ``BATCH``, from the one that follows ``after``.
        """
        finished = [status for status in Status if status.finished]
        with self.database.read() as connection:
            wanted = and_(jobs.c.status.in_(finished), or_(jobs.c.swept.is_(False), _forgotten(clock(connection))))
            if after is not None:
                wanted &= tuple_(jobs.c.created_at, jobs.c.id) > tuple_(after.created_at, after.id)
            statement = select(jobs).where(wanted).order_by(jobs.c.created_at, jobs.c.id).limit(BATCH)
            return [(rows.read_job(row), row.deleted_at is not None) for row in connection.execute(statement)]

    def set_swept(self, job_id: str) -> None:
        """The store holds nothing of the job but what is published. A row deleted long enough ago goes now."""
        with self.database.write() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == job_id, _forgotten(clock(connection))))
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(swept=True))

    def claims(self, job_id: str) -> Claims | None:
        """What the job may have in the store; None for an id that these records do not know."""
        recorded = select(shards.c.key).where(shards.c.job_id == job_id)
        with self.database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
            if row is None:
                return None
            job = rows.read_job(row)
            if not job.status.finished:
                keys = frozenset(connection.scalars(recorded))
            else:
                keys = frozenset() if row.deleted_at is not None else job.artifact_keys
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

    def _stale(self, ring_after: float) -> list[Ring]:
        with self.database.write() as connection:
            now = clock(connection)
            due = or_(jobs.c.rung_at <= now - timedelta(seconds=ring_after), jobs.c.retry_at > jobs.c.rung_at)
            stale = and_(jobs.c.status == Status.QUEUED, rows.may_start(now), due)
            # In turn: a queue that no worker serves must keep neither its own later jobs nor other queues waiting.
            turn = func.row_number().over(partition_by=jobs.c.queue, order_by=(jobs.c.rung_at, jobs.c.created_at))
            waiting = select(jobs.c.id, jobs.c.rung_at, turn.label("turn")).where(stale).subquery()
            next_ones = select(waiting.c.id).order_by(waiting.c.turn, waiting.c.rung_at).limit(BATCH)
            locked = select(jobs.c.id).where(jobs.c.id.in_(next_ones)).with_for_update(skip_locked=True)
            chosen = connection.scalars(locked).all()
            found = connection.execute(
                update(jobs).where(jobs.c.id.in_(chosen), stale).values(rung_at=now).returning(jobs)
            ).all()
        return [rows.ring(job) for job in sorted(map(rows.read_job, found), key=lambda job: (job.created_at, job.id))]


def _forgotten(now: datetime) -> ColumnElement[bool]:
    return jobs.c.deleted_at < now - timedelta(seconds=TOMBSTONE_SECONDS)


def _dead(now: datetime, stalled_after: float) -> ColumnElement[bool]:
    return and_(
        jobs.c.status.in_(rows.HELD),
        or_(
            jobs.c.lease_expires_at < now,
            jobs.c.progress_at < now - timedelta(seconds=stalled_after),
        ),
    )
