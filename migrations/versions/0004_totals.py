"""Totals for the metrics, and which events are in them. What happened before is not counted."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "totals",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("label", sa.String(length=96), nullable=False),
        sa.Column("bound", sa.String(length=16), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "label", "bound", name="pk_totals"),
    )
    op.add_column("events", sa.Column("counted", sa.Boolean(), nullable=False, server_default=sa.true()))
    op.create_index(
        "ix_events_uncounted",
        "events",
        ["id"],
        sqlite_where=sa.text("counted = 0"),
        postgresql_where=sa.text("NOT counted"),
    )


def downgrade() -> None:
    op.drop_index("ix_events_uncounted", "events")
    op.drop_column("events", "counted")
    op.drop_table("totals")
