"""When each version of the timestamp became current."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "timestamps",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("since", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Remove it."""
    op.drop_table("timestamps")
