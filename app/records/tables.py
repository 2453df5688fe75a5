"""The tables. The migrations make them; a test holds the two equal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    literal,
    text,
    true,
)
from sqlalchemy.types import TypeDecorator

from app.records.job import Kind, Status

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime in UTC. SQLite keeps it as text with six decimals, which sorts as time does."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite numbers rows by itself only in a column of exactly this type.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")


def _absent_json() -> JSON:
    """JSON whose None is SQL's NULL, so that `IS NULL` means what it says."""
    return JSON(none_as_null=True)


def _only(condition: str, *, sqlite: str = "") -> dict[str, Any]:
    """Of an index: that it holds these rows alone. ``sqlite``: for a Boolean, which SQLAlchemy asks for in two ways."""
    return {"sqlite_where": text(sqlite or condition), "postgresql_where": text(condition)}


def _job(**options: Any) -> Column[str]:
    return Column("job_id", String(96), ForeignKey("jobs.id", ondelete="CASCADE"), **options)


_UNSWEPT = _only("finished_at IS NOT NULL AND NOT swept", sqlite="finished_at IS NOT NULL AND swept = 0")
_LISTED = "deleted_at IS NULL"
_ASKED_OF_QUEUED = ("queue", "rung_at", "created_at", "id", "retry_at", "priority", "owner")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("stage", String(16)),
    Column("version", BigInteger, nullable=False),
    Column("queue", String(96), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("owner", String(96), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("resolved", JSON, nullable=False),
    Column("method", String(64), nullable=False),
    Column("plan_digest", String(64), nullable=False),
    Column("estimates", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("lease_token", String(32)),
    Column("lease_expires_at", UtcTime),
    Column("progress_bytes", BigInteger, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column(
        "reserved_bytes", BigInteger, nullable=False, server_default=text("0")
    ),  # of the store, until it is finished
    Column("progress_at", UtcTime),
    Column("failures", JSON, nullable=False, server_default=text("'[]'")),  # one entry for each attempt that failed
    Column("retry_at", UtcTime),  # of a queued job: nobody may claim it before
    Column("waits_for", String(16)),  # of a queued job: what a worker found missing
    Column("error", _absent_json()),
    Column("artifact", _absent_json()),
    Column("artifact_id", String(96)),  # in ``artifacts``; of a deleted job none
    Column("pinned", Boolean, nullable=False),
    Column("expires_in", Integer),  # seconds after publication
    Column("expires_at", UtcTime),
    Column("webhook", _absent_json()),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("updated_at", UtcTime, nullable=False),
    Column("rung_at", UtcTime, nullable=False),  # when the doorbell was last pressed, or found unnecessary
    Column("deleted_at", UtcTime),  # hidden from then on; the row goes once its files are gone
    Column("swept", Boolean, nullable=False),  # the store holds nothing of this job but what is published
    CheckConstraint(f"status IN ({', '.join(repr(str(status)) for status in Status)})", name="status"),
    CheckConstraint("(lease_token IS NOT NULL) = (status IN ('running', 'cancelling'))", name="lease"),
    CheckConstraint("(artifact IS NOT NULL) = (status = 'succeeded')", name="artifact"),
    # Lists. Each is read from one status after the other, the newest first, with and without an owner and a method.
    *(
        Index(f"ix_jobs_listed_{'_'.join(by)}", *by, "created_at", "id", **_only(_LISTED))
        for by in (("status",), ("owner", "status"), ("method", "status"), ("owner", "method", "status"))
    ),
    # Few are no merges; these are listed from an index of their own.
    Index("ix_jobs_listed_kind", "kind", "status", "created_at", "id", **_only(f"{_LISTED} AND kind <> 'merge'")),
    # What the janitor, the workers and the metrics look for again and again. Few rows are in any of these.
    Index("ix_jobs_queued", *_ASKED_OF_QUEUED, **_only("status = 'queued'")),
    Index("ix_jobs_held", "status", **_only("lease_token IS NOT NULL")),
    Index("ix_jobs_unswept", "created_at", "id", **_UNSWEPT),
    Index("ix_jobs_deleted", "deleted_at", **_only("deleted_at IS NOT NULL")),
    Index("ix_jobs_reserved", "owner", "reserved_bytes", **_only("finished_at IS NULL")),
    Index("ix_jobs_waits_for", "waits_for", **_only("waits_for IS NOT NULL")),
    Index(None, "artifact_id"),
    Index("ix_jobs_expires_at", "expires_at", **_only("expires_at IS NOT NULL")),
)

# What is published, by the job that made it: its row stays, hidden, as long as this one. The jobs whose
# ``artifact_id`` it is share it; with the last of them it goes, and its files after it.
artifacts = Table(
    "artifacts",
    metadata,
    Column("id", String(96), ForeignKey("jobs.id"), primary_key=True),
    Column("owner", String(96), nullable=False),
    Column("reuse_key", String(64)),  # see planning/reuse.py; without one it stands for no other merge
    Column("published_at", UtcTime, nullable=False),
    Index(None, "owner", "reuse_key", "published_at"),
)

# The merges that a job reads, as ``merge:ID``. They may be deleted once it has finished; the rows here stay.
merge_sources = Table(
    "merge_sources",
    metadata,
    _job(primary_key=True),
    Column("merge", String(96), primary_key=True, index=True),
)
# The same words as in the index, and no parameter: a planner that knows only ``status = ?`` cannot use it.
IS_QUEUED = jobs.c.status == literal(str(Status.QUEUED), literal_execute=True)
IS_NO_MERGE = jobs.c.kind != literal(str(Kind.MERGE), literal_execute=True)
IS_HELD = jobs.c.lease_token.is_not(None)  # running or cancelling

shards = Table(
    "shards",
    metadata,
    _job(primary_key=True),
    Column("name", String(512), primary_key=True),
    Column("key", String(1024), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("statistics", JSON, nullable=False),  # what the merge did to the file's tensors, by name
)

# What a sweep or an evaluation scores, all of it there when the job is submitted.
points = Table(
    "points",
    metadata,
    _job(primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("name", String(96), nullable=False),
    Column("settings", _absent_json()),
    Column("recipe", JSON, nullable=False),
    Column("resolved", JSON, nullable=False),
    Column("plan_digest", String(64), nullable=False),
    Column("scores", _absent_json()),
    Column("scored_at", UtcTime),
)

events = Table(
    "events",
    metadata,
    Column("id", RowNumber, primary_key=True, autoincrement=True),
    _job(nullable=False),
    Column("type", String(32), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("data", JSON, nullable=False),
    Column("counted", Boolean, nullable=False, server_default=true()),  # it is in ``totals``, or older than they are
    Index(None, "job_id", "id"),
    Index("ix_events_uncounted", "id", **_only("NOT counted", sqlite="counted = 0")),
    sqlite_autoincrement=True,  # an event's number is never given twice, so `Last-Event-ID` stays true
)

# What happened to all jobs, as numbers that only grow; ``tally.py`` says what each name means.
totals = Table(
    "totals",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("label", String(96), primary_key=True),
    Column("bound", String(16), primary_key=True),  # of a histogram: the bucket's, or "sum"; else empty
    Column("value", BigInteger, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(32), primary_key=True),
    _job(nullable=False, index=True),
    Column("owner", String(96), nullable=False),
    Column("type", String(64), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("body", Text, nullable=False),  # as it is signed, byte by byte
    Column("state", String(16), nullable=False),
    Column("attempts", JSON, nullable=False),
    Column("next_at", UtcTime, index=True),  # None: never again
    Column("created_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(96), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    _job(nullable=False, index=True),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("sha256", String(64), nullable=False),  # of the whole key: the key itself is kept nowhere
    Column("owner", String(96), nullable=False),
    Column("note", String(200), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("replaces", String(16), ForeignKey("keys.id")),
    Column("quota_bytes", BigInteger),  # in place of MERGEYARD_QUOTA_BYTES_PER_OWNER
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
)

sessions = Table(
    "sessions",
    metadata,
    Column("sha256", String(64), primary_key=True),  # of the cookie
    Column("key_id", String(16), ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
)

uploads = Table(
    "uploads",
    metadata,
    Column("owner", String(96), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column(
        "size", BigInteger, nullable=False, server_default=text("0")
    ),  # bytes; 0 where it was sent before this column
    Column("created_at", UtcTime, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(160), primary_key=True),
    Column("host", String(96), nullable=False),
    Column("process", BigInteger, nullable=False),
    Column("device", String(200)),  # once its child is warm
    Column("queues", JSON, nullable=False),
    Column("version", String(64), nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("seen_at", UtcTime, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("owner", String(96), primary_key=True),
    Column("name", String(96), primary_key=True),
    Column("merge", String(96), ForeignKey("jobs.id"), nullable=False, index=True),  # no cascade: the row must stay
    Column("commit", String(40), nullable=False),  # of its artifact; see manifest.commit_of
    Column("created_at", UtcTime, nullable=False),
    Column("moved_at", UtcTime, nullable=False),
)

# What an alias has pointed to. A merge that it left may be deleted; the row here stays.
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", RowNumber, primary_key=True, autoincrement=True),
    Column("owner", String(96), nullable=False),
    Column("name", String(96), nullable=False),
    Column("merge", String(96), nullable=False),
    Column("commit", String(40), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("key_id", String(16)),
    ForeignKeyConstraint(["owner", "name"], ["aliases.owner", "aliases.name"], ondelete="CASCADE"),
    Index(None, "owner", "name", "id"),
)

# What each owner's jobs take: artifacts that are published, and unfinished jobs. Changed with the rows that it sums up.
usage = Table(
    "usage",
    metadata,
    Column("owner", String(96), primary_key=True),
    Column("artifact_bytes", BigInteger, nullable=False),
    Column("reserved_bytes", BigInteger, nullable=False),
    Column("unfinished", BigInteger, nullable=False),
)

# No foreign keys: an entry outlives the merge and the key that it names.
audit = Table(
    "audit",
    metadata,
    Column("id", RowNumber, primary_key=True, autoincrement=True),
    Column("at", UtcTime, nullable=False),
    Column("action", String(32), nullable=False),
    Column("owner", String(96), nullable=False),
    Column("key_id", String(16)),
    Column("request_id", String(100), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "owner", "id"),
    Index(None, "action", "id"),
    Index(None, "owner", "action", "id"),
    sqlite_autoincrement=True,
)
