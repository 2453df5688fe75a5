"""Artifacts that several merges share, the merges that a job reads, and what expires next."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from app.records.tables import UtcTime

revision: str = "0011"
down_revision: str | Sequence[str] | None = "0010"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

EXPIRES = sa.text("expires_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("artifact_id", sa.String(length=96), nullable=True))
    op.create_table(
        "artifacts",
        sa.Column("id", sa.String(length=96), nullable=False),
        sa.Column("owner", sa.String(length=96), nullable=False),
        sa.Column("reuse_key", sa.String(length=64), nullable=True),
        sa.Column("published_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["id"], ["jobs.id"], name="fk_artifacts_id"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
    )
    op.create_table(
        "merge_sources",
        sa.Column("job_id", sa.String(length=96), nullable=False),
        sa.Column("merge", sa.String(length=96), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_merge_sources_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "merge", name="pk_merge_sources"),
    )
    # How the files were that earlier merges read nobody knows: their artifacts have no reuse key.
    op.execute(
        sa.text(
            "INSERT INTO artifacts (id, owner, published_at) SELECT id, owner, finished_at FROM jobs "
            "WHERE status = 'succeeded' AND deleted_at IS NULL"
        )
    )
    op.execute(sa.text("UPDATE jobs SET artifact_id = id WHERE status = 'succeeded' AND deleted_at IS NULL"))
    op.create_index("ix_jobs_artifact_id", "jobs", ["artifact_id"])
    op.create_index("ix_jobs_expires_at", "jobs", ["expires_at"], sqlite_where=EXPIRES, postgresql_where=EXPIRES)
    op.create_index("ix_artifacts_owner_reuse_key_published_at", "artifacts", ["owner", "reuse_key", "published_at"])
    op.create_index("ix_merge_sources_merge", "merge_sources", ["merge"])


def downgrade() -> None:
    op.drop_table("merge_sources")
    op.drop_table("artifacts")
    op.drop_index("ix_jobs_expires_at", "jobs")
    op.drop_index("ix_jobs_artifact_id", "jobs")
    op.drop_column("jobs", "artifact_id")
