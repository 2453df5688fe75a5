"""What jobs reserve, and what artifacts and uploads take: the quotas' figures."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | Sequence[str] | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

RESERVED = sa.text("finished_at IS NULL")
WAITS = sa.text("waits_for IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reserved_bytes", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("waits_for", sa.String(length=16), nullable=True))
    op.add_column("uploads", sa.Column("size", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.create_table(
        "usage",
        sa.Column("owner", sa.String(length=96), nullable=False),
        sa.Column("artifact_bytes", sa.BigInteger(), nullable=False),
        sa.Column("reserved_bytes", sa.BigInteger(), nullable=False),
        sa.Column("unfinished", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name="pk_usage"),
    )
    op.execute(sa.text("UPDATE jobs SET reserved_bytes = total_bytes WHERE finished_at IS NULL"))
    names = ("owner", "deleted_at", "finished_at", "reserved_bytes")
    jobs = sa.table("jobs", *map(sa.column, names), sa.column("artifact", sa.JSON()))
    size = sa.cast(jobs.c.artifact["size"].as_string(), sa.BigInteger)
    ended = jobs.c.finished_at.is_not(None)
    sums = sa.select(
        jobs.c.owner,
        sa.func.sum(sa.case((jobs.c.deleted_at.is_(None) & jobs.c.artifact.is_not(None), size), else_=0)),
        sa.func.sum(sa.case((ended, 0), else_=jobs.c.reserved_bytes)),
        sa.func.sum(sa.case((ended, 0), else_=1)),
    )
    columns = ["owner", "artifact_bytes", "reserved_bytes", "unfinished"]
    usage = sa.table("usage", *map(sa.column, columns))
    op.execute(usage.insert().from_select(columns, sums.group_by(jobs.c.owner)))
    op.create_index(
        "ix_jobs_reserved", "jobs", ["owner", "reserved_bytes"], sqlite_where=RESERVED, postgresql_where=RESERVED
    )
    op.create_index("ix_jobs_waits_for", "jobs", ["waits_for"], sqlite_where=WAITS, postgresql_where=WAITS)


def downgrade() -> None:
    op.drop_index("ix_jobs_waits_for", "jobs")
    op.drop_index("ix_jobs_reserved", "jobs")
    op.drop_table("usage")
    op.drop_column("uploads", "size")
    op.drop_column("jobs", "waits_for")
    op.drop_column("jobs", "reserved_bytes")
