"""Tokens, devices, reports, rollouts, rounds, and the audit log that only grows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME = sa.String(200)


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("device_id", sa.String(64)),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("used", sa.Float),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("enrolled", sa.Float, nullable=False),
        sa.Column("serial", sa.String(64), nullable=False),
        sa.Column("certificate", sa.LargeBinary, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("inventory", sa.JSON, nullable=False),
        sa.Column("revoked", sa.Float),
        sa.Column("last_seen", sa.Float),
        sa.Column("last_sequence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("timestamp_version", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("running", NAME, nullable=False, server_default=""),
        sa.Column("before", NAME, nullable=False, server_default=""),
        sa.Column("health", sa.JSON),
    )
    _create_reports()
    op.create_table(
        "rollouts",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("rollout", sa.String(64), nullable=False),
        sa.Column("orders", sa.JSON, nullable=False),
        sa.Column("decided", sa.Float, nullable=False),
        sa.Column("published", sa.Float),
    )
    _create_audit()


def _create_reports() -> None:
    op.create_table(
        "reports",
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("received", sa.Float, nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("release", NAME, nullable=False),
        sa.Column("rollout", NAME, nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
    )
    op.create_index("reports_by_rollout", "reports", ["rollout", "device_id"])
    op.create_table(
        "outcomes",
        sa.Column("rollout", sa.String(64), primary_key=True),
        sa.Column("device_id", sa.String(64), primary_key=True),
        sa.Column("release", NAME, primary_key=True),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("quality", sa.JSON),
        sa.Column("payload_bytes", sa.BigInteger, nullable=False),
        sa.Column("received", sa.Float, nullable=False),
    )


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("who", sa.String(100), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", NAME, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
    )
    op.create_table(
        "operators",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END"
            )
