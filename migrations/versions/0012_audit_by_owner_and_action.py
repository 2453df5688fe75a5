"""What one owner did of one kind is found among very many entries of either."""

from collections.abc import Sequence

from alembic import op

revision: str = "0012"
down_revision: str | Sequence[str] | None = "0011"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_index("ix_audit_owner_action_id", "audit", ["owner", "action", "id"])


def downgrade() -> None:
    op.drop_index("ix_audit_owner_action_id", "audit")
