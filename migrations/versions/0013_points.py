"""What is no merge: sweeps and evaluations, the points that they score, and the index that they are listed from."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from app.records.tables import UtcTime

revision: str = "0013"
down_revision: str | Sequence[str] | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

OTHERS = sa.text("deleted_at IS NULL AND kind <> 'merge'")


def upgrade() -> None:
    op.create_table(
        "points",
        sa.Column("job_id", sa.String(length=96), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=96), nullable=False),
        sa.Column("settings", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("resolved", sa.JSON(), nullable=False),
        sa.Column("plan_digest", sa.String(length=64), nullable=False),
        sa.Column("scores", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("scored_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_points_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_points"),
    )
    op.create_index(
        "ix_jobs_listed_kind",
        "jobs",
        ["kind", "status", "created_at", "id"],
        sqlite_where=OTHERS,
        postgresql_where=OTHERS,
    )


def downgrade() -> None:
    """The version before knows merges alone: what is none goes, as nobody could work on it."""
    op.drop_index("ix_jobs_listed_kind", "jobs")
    op.drop_table("points")
    op.execute(sa.text("DELETE FROM jobs WHERE kind <> 'merge'"))
