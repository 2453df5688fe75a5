"""Aliases, and what each has pointed to."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from app.records.tables import RowNumber, UtcTime

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("owner", sa.String(length=96), nullable=False),
        sa.Column("name", sa.String(length=96), nullable=False),
        sa.Column("merge", sa.String(length=96), nullable=False),
        sa.Column("commit", sa.String(length=40), nullable=False),
        sa.Column("created_at", UtcTime(), nullable=False),
        sa.Column("moved_at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["merge"], ["jobs.id"], name="fk_aliases_merge"),
        sa.PrimaryKeyConstraint("owner", "name", name="pk_aliases"),
    )
    op.create_index("ix_aliases_merge", "aliases", ["merge"])
    op.create_table(
        "alias_moves",
        sa.Column("id", RowNumber, autoincrement=True, nullable=False),
        sa.Column("owner", sa.String(length=96), nullable=False),
        sa.Column("name", sa.String(length=96), nullable=False),
        sa.Column("merge", sa.String(length=96), nullable=False),
        sa.Column("commit", sa.String(length=40), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=True),
        sa.ForeignKeyConstraint(
            ["owner", "name"], ["aliases.owner", "aliases.name"], name="fk_alias_moves_owner", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
    )
    op.create_index("ix_alias_moves_owner_name_id", "alias_moves", ["owner", "name", "id"])


def downgrade() -> None:
    for table in ("alias_moves", "aliases"):
        op.drop_table(table)
