"""Certificates by serial, so that several of one device overlap; keys authorised beforehand."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from cryptography import x509

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables, and list the certificates that devices hold already."""
    certificates = op.create_table(
        "certificates",
        sa.Column("serial", sa.String(64), primary_key=True),
        sa.Column("device_id", sa.String(64), nullable=False),
        sa.Column("issued", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    op.create_index("certificates_by_device", "certificates", ["device_id"])
    op.create_index("devices_by_key", "devices", ["public_key"])
    op.create_table(
        "authorised_keys",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("device_id", sa.String(64)),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("used", sa.Float),
    )
    connection = op.get_bind()
    held = connection.execute(
        sa.text("SELECT id, enrolled, serial, certificate, revoked FROM devices")
    )
    for device_id, enrolled, serial, pem, revoked in held.all():
        end = x509.load_pem_x509_certificate(bytes(pem)).not_valid_after_utc.timestamp()
        row = {
            "serial": serial,
            "device_id": device_id,
            "issued": enrolled,
            "expires": end,
            "revoked": revoked,
        }
        connection.execute(certificates.insert().values(row))


def downgrade() -> None:
    """Remove them."""
    op.drop_index("devices_by_key", "devices")
    op.drop_table("authorised_keys")
    op.drop_table("certificates")
