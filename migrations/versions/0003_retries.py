"""Why each attempt of a job failed, and when the next one may begin."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from app.records.tables import UtcTime

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("failures", sa.JSON(), nullable=False, server_default=sa.text("'[]'")))
    op.add_column("jobs", sa.Column("retry_at", UtcTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "retry_at")
    op.drop_column("jobs", "failures")
