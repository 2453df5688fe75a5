"""Keys with a quota of their own."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | Sequence[str] | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("quota_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("keys", "quota_bytes")
