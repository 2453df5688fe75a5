"""Indexes for what is asked again and again: lists by owner, status and method; what waits, runs or is to be swept."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | Sequence[str] | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

LISTS = (["status"], ["owner", "status"], ["method", "status"], ["owner", "method", "status"])
BEFORE = (["created_at", "id"], ["status", "created_at", "id"], ["owner", "created_at", "id"])


def upgrade() -> None:
    for columns in BEFORE:
        op.drop_index(f"ix_jobs_{'_'.join(columns)}", "jobs")
    for by in LISTS:
        op.create_index(
            f"ix_jobs_listed_{'_'.join(by)}", "jobs", [*by, "created_at", "id"], **only("deleted_at IS NULL")
        )
    queued = ["queue", "rung_at", "created_at", "id", "retry_at", "priority", "owner"]
    op.create_index("ix_jobs_queued", "jobs", queued, **only("status = 'queued'"))
    op.create_index("ix_jobs_held", "jobs", ["status"], **only("lease_token IS NOT NULL"))
    op.create_index(
        "ix_jobs_unswept",
        "jobs",
        ["created_at", "id"],
        sqlite_where=sa.text("finished_at IS NOT NULL AND swept = 0"),
        postgresql_where=sa.text("finished_at IS NOT NULL AND NOT swept"),
    )
    op.create_index("ix_jobs_deleted", "jobs", ["deleted_at"], **only("deleted_at IS NOT NULL"))


def downgrade() -> None:
    lists = [f"ix_jobs_listed_{'_'.join(by)}" for by in LISTS]
    for name in (*lists, "ix_jobs_queued", "ix_jobs_held", "ix_jobs_unswept", "ix_jobs_deleted"):
        op.drop_index(name, "jobs")
    for columns in BEFORE:
        op.create_index(f"ix_jobs_{'_'.join(columns)}", "jobs", columns)


def only(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}
