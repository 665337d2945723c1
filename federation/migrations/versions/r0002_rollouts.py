"""Attempts and health of an outcome, roles of operators, and the audit log as a chain."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from federation.audit import GENESIS, digest_of

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, and chain the lines that are there."""
    op.add_column("outcomes", sa.Column("attempts", sa.Integer, nullable=False, server_default="1"))
    op.add_column("outcomes", sa.Column("health_before", sa.JSON))
    op.add_column("outcomes", sa.Column("health_after", sa.JSON))
    op.add_column(
        "operators", sa.Column("role", sa.String(16), nullable=False, server_default="admin")
    )
    op.add_column("operators", sa.Column("revoked", sa.Float))
    op.add_column("audit", sa.Column("digest", sa.String(64), nullable=False, server_default=""))
    sqlite = op.get_bind().dialect.name == "sqlite"
    if sqlite:
        op.execute("DROP TRIGGER audit_no_update")
    _chain()
    if sqlite:
        op.execute(
            "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
            "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END"
        )


def _chain() -> None:
    names = ("number", "at", "who", "action", "subject", "why", "digest")
    audit = sa.table("audit", *(sa.column(name) for name in names))
    connection, previous = op.get_bind(), GENESIS
    columns = [audit.c[name] for name in names[:-1]]
    for row in connection.execute(sa.select(*columns).order_by(audit.c.number)).all():
        previous = digest_of(previous, *row)
        connection.execute(
            audit.update().where(audit.c.number == row.number).values(digest=previous)
        )
