"""The repository of jobs: every statement on them that the API and the workers need.

Each method is one short transaction: read the row under its lock, ask the rule in ``transitions`` what to write,
write it, append the events. What a worker writes carries its lease token; where the token no longer holds the row,
nothing is written and LeaseLost is raised. Every write grows ``version``, the ETag.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, func, insert, select, tuple_, union_all, update
from sqlalchemy.exc import IntegrityError

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.records import artifacts, audit, quotas, removal, rows, transitions
from app.records.database import Database, clock
from app.records.job import Beat, Event, Idempotency, Job, Kind, NewJob, NoRoom, Page, Shard, Stage, Status
from app.records.key import Caller
from app.records.quotas import NO_LIMITS, Free, Limits
from app.records.tables import IS_NO_MERGE, events, jobs, shards
from app.records.transitions import Change
from app.tasks.task import TaskScore

Rule = Callable[[Job, datetime], Change]
Conditions = list[ColumnElement[bool]]


class Jobs:
    """Jobs in ``database``. An id that does not exist, or was deleted, raises MergeyardError ``not_found``.

    ``by`` is whoever asks: another owner's jobs are ``not_found`` too, and what they change is in the audit. None is
    the service itself, which sees every job. ``kind`` is what is asked for; one of another is ``not_found``, too.
    """

    def __init__(self, database: Database, *, retry_seconds: float = 0.0) -> None:
        """``retry_seconds``: how long a job waits after its first failure; see ``transitions.fail``."""
        self.database = database
        self.retry_seconds = retry_seconds

    # ── submitting and reading ───────────────────────────────────────────────────────────────────

    def submit(
        self,
        new: NewJob,
        *,
        idempotency: Idempotency | None = None,
        reuse: str | None = None,
        by: Caller | None = None,
        limits: Limits = NO_LIMITS,
    ) -> tuple[Job, bool]:
        """Insert a queued job. (the earlier job, False) where the same key came with the same request before.

        ``reuse``: the artifact (``Job.artifact_id``) that is the job's result, which makes it ``succeeded`` at once
        unless the artifact went a moment ago; it takes no room. ``by`` is for the audit; whose the job is stands in
        ``new``. Raises ``idempotency_mismatch`` where the key came with another request, ``source_not_found`` where a
        merge that the job reads was deleted, and ``too_many_jobs``, ``over_quota`` or ``storage_full`` where ``limits``
        leave no room.
        """
        try:
            with self.database.write() as connection:
                if idempotency is not None and (earlier := rows.earlier(connection, idempotency)) is not None:
                    return earlier, False
                artifacts.lock_read(connection, new.merges)
                maker = artifacts.hold(connection, reuse, new.owner) if reuse else None
                if maker is None:
                    quotas.admit(connection, new, limits)
                job = rows.insert_job(connection, new, idempotency)
                if maker is not None:
                    job = rows.apply(connection, job, transitions.reuse(job, clock(connection), made_by=maker))
                _record(connection, by, "submitted", job.id)
                return job, True
        except IntegrityError:
            # On PostgreSQL two first requests may both find nothing; the unique index lets one of them in.
            if idempotency is None or (found := self.earlier(idempotency)) is None:
                raise
            return found, False

    def earlier(self, idempotency: Idempotency) -> Job | None:
        """The job an Idempotency-Key already made. Ask before planning: the sources may have moved since.

        Raises ``idempotency_mismatch`` where the key came with another request.
        """
        with self.database.read() as connection:
            return rows.earlier(connection, idempotency)

    def reusable(self, new: NewJob) -> Job | None:
        """The job whose artifact may be the new one's result; deleted or not, it made the artifact."""
        if new.reuse_key is None:
            return None
        with self.database.read() as connection:
            return artifacts.reusable(connection, new.owner, new.reuse_key)

    def get(self, job_id: str, *, by: Caller | None = None, kind: Kind | None = Kind.MERGE) -> Job:
        """The job as it is now. ``kind`` None: of any."""
        with self.database.read() as connection:
            return rows.get(connection, job_id, by=by, kind=kind)

    def list(
        self,
        *,
        status: Status | str | Collection[Status] | None = None,
        method: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        by: Caller | None = None,
        kind: Kind | None = Kind.MERGE,
    ) -> Page:
        """Jobs, newest first, ``limit`` a page; ``kind`` None: of any. A bad cursor is ``request_invalid``."""
        conditions: Conditions = [jobs.c.deleted_at.is_(None)]
        if kind is not None:
            conditions.append(jobs.c.kind == kind)
        if kind not in (None, Kind.MERGE):
            conditions.append(IS_NO_MERGE)  # what their index says of itself
        if by is not None and by.sees is not None:
            conditions.append(jobs.c.owner == by.sees)
        if method is not None:
            conditions.append(jobs.c.method == method)
        if cursor is not None:
            conditions.append(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*rows.read_cursor(cursor)))
        wanted = list(Status) if status is None else [status] if isinstance(status, str) else status
        statement = _newest(sorted(set(wanted)), conditions, limit + 1)  # one more tells whether there is a next page
        with self.database.read() as connection:
            found = [rows.read_listed(row) for row in connection.execute(statement)] if wanted else []
        more = len(found) > limit
        page = tuple(found[:limit])
        return Page(jobs=page, next_cursor=rows.write_cursor(page[-1]) if more else None)

    def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        limit: int = 200,
        without: Collection[str] = (),
        by: Caller | None = None,
        kind: Kind | None = Kind.MERGE,
    ) -> Sequence[Event]:
        """The job's events numbered above ``after``, oldest first, but for those of a type in ``without``."""
        statement = (
            select(events.c.id, events.c.job_id, events.c.type, events.c.at, events.c.data)
            .where(events.c.job_id == job_id, events.c.id > after, events.c.type.not_in(without))
            .order_by(events.c.id)
            .limit(limit)
        )
        with self.database.read() as connection:
            rows.get(connection, job_id, by=by, kind=kind)
            return [Event(**row._mapping) for row in connection.execute(statement)]

    def shards(self, job_id: str) -> Sequence[Shard]:
        """The files that attempts of this job have finished and recorded, by name."""
        statement = select(shards).where(shards.c.job_id == job_id).order_by(shards.c.name)
        with self.database.read() as connection:
            return [
                Shard(
                    file=StoredFile(name=row.name, key=row.key, size=row.size, sha256=row.sha256),
                    statistics=row.statistics,
                )
                for row in connection.execute(statement)
            ]

    # ── from outside ─────────────────────────────────────────────────────────────────────────────

    def request_cancel(self, job_id: str, *, by: Caller | None = None, kind: Kind | None = Kind.MERGE) -> Job:
        """Cancel a queued job, ask a running one to stop. Idempotent; ``conflict`` once it succeeded or failed."""
        with self.database.write() as connection:
            job = rows.get(connection, job_id, by=by, lock=True, kind=kind)
            written = rows.apply(connection, job, transitions.request_cancel(job, clock(connection)))
            if written.version != job.version:
                _record(connection, by, "cancelled", job_id)
            return written

    def delete(self, job_id: str, *, by: Caller | None = None, kind: Kind | None = Kind.MERGE) -> Job:
        """Hide a finished job, else ``conflict``; ``merge_in_use`` while an alias or an unfinished job needs it.

        The job as it was. Its files are the caller's or the janitor's to delete, unless other jobs share them.
        """
        with self.database.write() as connection:
            job = rows.get(connection, job_id, by=by, lock=True, kind=kind)
            removal.remove(connection, job, transitions.delete(job, clock(connection)), "deleted", by=by)
            return job

    # ── a worker's ───────────────────────────────────────────────────────────────────────────────

    def claim(
        self, job_id: str, *, lease_seconds: float, worker: str = "", process: int = 0, free: Free | None = None
    ) -> Job | None:
        """Compare and set: of any number of claimants of a free job one gets it, with a fresh token, the others None.

        ``worker`` is the worker's name, ``process`` the id of its process that does the work.

        Free is: queued and not waiting for its ``retry_at``. A wait longer than there is means that the database's
        clock was set back, and binds nobody. A job whose lease ran out is taken from its dead worker first, as the
        janitor would do it: then it may be free, or wait, or have no attempt left.

        The statement decides by itself on both databases: SQLite runs one writer at a time; PostgreSQL (read
        committed) makes the second UPDATE wait for the first one's commit and then tests the WHERE again on the row.

        Raises NoRoom, and claims nothing, where the store, which has ``free()`` bytes left, has too little for a queued
        job.
        """
        with self.database.write() as connection:
            if free is not None:
                quotas.check_room(connection, job_id, free)
            lost = self._lose_expired(connection, job_id)
            now = clock(connection) if lost is None else lost.updated_at  # one moment: it was not queued in between
            row = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status == Status.QUEUED, rows.may_start(now))
                .values(
                    status=Status.RUNNING,
                    stage=Stage.RESOLVING,
                    attempt=jobs.c.attempt + 1,
                    lease_token=secrets.token_hex(16),
                    lease_expires_at=now + timedelta(seconds=lease_seconds),
                    retry_at=None,
                    waits_for=None,
                    progress_bytes=0,
                    progress_at=now,
                    started_at=func.coalesce(jobs.c.started_at, now),
                    updated_at=now,
                    version=jobs.c.version + 1,
                )
                .returning(jobs)
            ).one_or_none()
            if row is None:
                return None
            job = rows.read_job(row)
            rows.append(
                connection,
                job_id,
                now,
                ("claimed", {"attempt": job.attempt, "worker": worker, "process": process}),
            )
            return job

    def wait_for_disk(self, job_id: str, lacking: NoRoom, *, pause: float) -> None:
        """The job stays queued, and for ``pause`` seconds nobody looks at it again."""
        with self.database.write() as connection:
            job = rows.get(connection, job_id, lock=True, kind=None)
            if job.status is Status.QUEUED:
                change = transitions.wait_for_disk(
                    job, clock(connection), needs=lacking.needs, free=lacking.free, pause=pause
                )
                rows.apply(connection, job, change)

    def heartbeat(
        self,
        job_id: str,
        token: str,
        *,
        lease_seconds: float,
        progress_bytes: int | None = None,
        total_bytes: int | None = None,
    ) -> Beat:
        """Prolong the lease, write the progress where given, and bring back whether a cancel was requested."""
        job = self._held(
            job_id,
            token,
            lambda job, now: transitions.heartbeat(
                job, now, lease_seconds=lease_seconds, progress_bytes=progress_bytes, total_bytes=total_bytes
            ),
        )
        return Beat(cancel_requested=job.status is Status.CANCELLING)

    def set_stage(self, job_id: str, token: str, stage: Stage | str) -> Job:
        """The attempt enters ``stage``."""
        return self._held(job_id, token, lambda job, now: transitions.enter_stage(job, now, stage=Stage(stage)))

    def record_score(self, job_id: str, token: str, score: TaskScore) -> Job:
        """The result was scored on a task."""
        return self._held(job_id, token, lambda job, now: transitions.score(job, now, found=score))

    def record_shard(self, job_id: str, token: str, file: StoredFile, statistics: Mapping[str, Any]) -> None:
        """A file of the artifact is complete and durable in the store; a retry's file of that name replaces it."""
        with self.database.write() as connection:
            job = rows.get_held(connection, job_id, token)
            rows.apply(connection, job, transitions.finish_file(job, file))
            connection.execute(delete(shards).where(shards.c.job_id == job_id, shards.c.name == file.name))
            connection.execute(
                insert(shards).values(
                    job_id=job_id,
                    name=file.name,
                    key=file.key,
                    size=file.size,
                    sha256=file.sha256,
                    statistics=dict(statistics),
                )
            )

    def publish(self, job_id: str, token: str, artifact: Mapping[str, Any], *, reuse_key: str | None = None) -> Job:
        """Make ``artifact`` (as ``Job.artifact``) the result, and that of later jobs with the same ``reuse_key``.

        CancelRequested once a cancel was accepted.
        """
        with self.database.write() as connection:
            job = rows.get_held(connection, job_id, token)
            now = clock(connection)
            published = rows.apply(connection, job, transitions.publish(job, now, artifact=artifact))
            artifacts.add(connection, published, now, reuse_key)
            return published

    def conclude(self, job_id: str, token: str) -> Job:
        """Every point is scored. CancelRequested once a cancel was accepted."""
        return self._held(job_id, token, transitions.conclude)

    def fail(self, job_id: str, token: str, error: MergeyardError, *, retry: bool) -> Job:
        """The attempt failed: queued again where ``retry`` and attempts remain, else failed."""
        return self._held(
            job_id,
            token,
            lambda job, now: transitions.fail(job, now, error=error, retry=retry, pause=self.retry_seconds),
        )

    def hand_back(self, job_id: str, token: str) -> Job:
        """The worker was told to stop: queued again, and the attempt does not count."""
        return self._held(job_id, token, transitions.hand_back)

    def lose(self, job_id: str, *, worker: str, process: int, reason: str) -> Job | None:
        """A ``process`` of the ``worker`` died, as that one saw: what it held ends now and not with its lease.

        None where it holds no attempt of the job, which another may hold by now. ``reason`` is a key of
        ``transitions.LOST``.
        """
        held = select(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(rows.HELD)).with_for_update()
        claims = select(events.c.data).where(events.c.job_id == job_id, events.c.type == "claimed")
        with self.database.write() as connection:
            row = connection.execute(held).one_or_none()
            # Claimed in one transaction with the event, so the last one tells who holds a row that is held.
            claim = connection.scalars(claims.order_by(events.c.id.desc()).limit(1)).one_or_none()
            if row is None or claim is None or (claim["worker"], claim.get("process")) != (worker, process):
                return None
            job = rows.read_job(row)
            change = transitions.lose(job, clock(connection), reason=reason, pause=self.retry_seconds)
            return rows.apply(connection, job, change)

    def confirm_cancelled(self, job_id: str, token: str) -> Job:
        """The worker stopped as it was asked to."""
        return self._held(job_id, token, transitions.confirm_cancelled)

    # ── how a rule is applied ────────────────────────────────────────────────────────────────────

    def _lose_expired(self, connection: Connection, job_id: str) -> Job | None:
        now = clock(connection)
        expired = select(jobs).where(jobs.c.id == job_id, jobs.c.lease_expires_at < now)
        row = connection.execute(expired.with_for_update()).one_or_none()
        if row is None:
            return None
        job = rows.read_job(row)
        change = transitions.lose(job, now, reason="lease_expired", pause=self.retry_seconds)
        return rows.apply(connection, job, change)

    def _held(self, job_id: str, token: str, rule: Rule) -> Job:
        with self.database.write() as connection:
            job = rows.get_held(connection, job_id, token)
            return rows.apply(connection, job, rule(job, clock(connection)))


def _newest(statuses: Sequence[str], conditions: Conditions, limit: int) -> Select[Any]:
    """The newest of each status, of which each has an index in the order of the list; and of these the newest."""
    order = (jobs.c.created_at.desc(), jobs.c.id.desc())
    of_each = [
        select(jobs.c.created_at, jobs.c.id).where(jobs.c.status == status, *conditions).order_by(*order).limit(limit)
        for status in statuses
    ]
    candidates = union_all(*(select(one.subquery()) for one in of_each)).subquery()
    newest = (
        select(candidates.c.id).order_by(candidates.c.created_at.desc(), candidates.c.id.desc()).limit(limit).subquery()
    )
    return select(*rows.LISTED).join_from(newest, jobs, jobs.c.id == newest.c.id).order_by(*order)


def _record(connection: Connection, by: Caller | None, action: str, job_id: str) -> None:
    if by is not None:
        audit.record(connection, by, action, job_id)
