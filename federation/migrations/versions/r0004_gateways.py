"""What several gateways share: marks, and which of them a device's stream is open at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table and the column; on PostgreSQL the audit log learns that it only grows."""
    marks = op.create_table(
        "marks",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.bulk_insert(marks, [{"name": "turn", "value": "0"}])
    op.add_column("devices", sa.Column("gateway", sa.String(64)))
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(
        "CREATE FUNCTION airpeft_audit_only_grows() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE integrity_constraint_violation "
        "USING MESSAGE = 'the audit log only grows'; END $$"
    )
    for verb in ("UPDATE", "DELETE", "TRUNCATE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION airpeft_audit_only_grows()"
        )


def downgrade() -> None:
    """Remove them."""
    if op.get_bind().dialect.name == "postgresql":
        for verb in ("UPDATE", "DELETE", "TRUNCATE"):
            op.execute(f"DROP TRIGGER audit_no_{verb.lower()} ON audit")
        op.execute("DROP FUNCTION airpeft_audit_only_grows()")
    op.drop_column("devices", "gateway")
    op.drop_table("marks")
