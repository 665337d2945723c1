"""The tables of the server's database, as its newest migration leaves them."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

tokens = sa.Table(
    "tokens",
    METADATA,
    sa.Column("digest", sa.String(64), primary_key=True),  # SHA-256 of the token, hex
    sa.Column("device_id", sa.String(64)),  # the name wished for, or the one given
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),  # Unix seconds, as all times here
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
)
devices = sa.Table(
    "devices",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("enrolled", sa.Float, nullable=False),
    sa.Column("serial", sa.String(64), nullable=False),  # of the certificate, hex
    sa.Column("certificate", sa.LargeBinary, nullable=False),  # PEM
    sa.Column("public_key", sa.LargeBinary, nullable=False),  # SubjectPublicKeyInfo, DER
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("inventory", sa.JSON, nullable=False),
    sa.Column("revoked", sa.Float),
    sa.Column("last_seen", sa.Float),
    sa.Column("last_sequence", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("timestamp_version", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("running", sa.String(200), nullable=False, server_default=""),
    sa.Column("before", sa.String(200), nullable=False, server_default=""),  # ran before that
    sa.Column("health", sa.JSON),
    sa.Column("gateway", sa.String(64)),  # where its stream is open, if it is
    sa.Index("devices_by_key", "public_key"),
)
certificates = sa.Table(  # every one that was issued to a device; several may hold at a time
    "certificates",
    METADATA,
    sa.Column("serial", sa.String(64), primary_key=True),  # hex
    sa.Column("device_id", sa.String(64), nullable=False),
    sa.Column("issued", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
    sa.Index("certificates_by_device", "device_id"),
)
authorised_keys = sa.Table(  # public keys that may enrol without a token
    "authorised_keys",
    METADATA,
    sa.Column("digest", sa.String(64), primary_key=True),  # SHA-256 of the key (SPKI, DER), hex
    sa.Column("device_id", sa.String(64)),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
)
reports = sa.Table(
    "reports",
    METADATA,
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("received", sa.Float, nullable=False),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("release", sa.String(200), nullable=False),
    sa.Column("rollout", sa.String(200), nullable=False),
    sa.Column("reason", sa.String(64)),
    sa.Column("body", sa.LargeBinary, nullable=False),  # exactly what the device signed
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Index("reports_by_rollout", "rollout", "device_id"),
)
outcomes = sa.Table(  # a device's last word on a release in a rollout; reports tell the whole story
    "outcomes",
    METADATA,
    sa.Column("rollout", sa.String(64), primary_key=True),
    sa.Column("device_id", sa.String(64), primary_key=True),
    sa.Column("release", sa.String(200), primary_key=True),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("reason", sa.String(64)),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("quality", sa.JSON),
    sa.Column("payload_bytes", sa.BigInteger, nullable=False),
    sa.Column("received", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="1"),  # that failed
    sa.Column("health_before", sa.JSON),
    sa.Column("health_after", sa.JSON),
)
rollouts = sa.Table(
    "rollouts",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("state", sa.String(32), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),  # Rollout.to_mapping()
)
rounds = sa.Table(  # decided first, published after: a kill in between is made good at the start
    "rounds",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("rollout", sa.String(64), nullable=False),
    sa.Column("orders", sa.JSON, nullable=False),
    sa.Column("decided", sa.Float, nullable=False),
    sa.Column("published", sa.Float),
)
timestamps = sa.Table(  # of the metadata: how long a device has lacked what is newer
    "timestamps",
    METADATA,
    sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("since", sa.Float, nullable=False),
)
audit = sa.Table(
    "audit",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("who", sa.String(100), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, server_default=""),  # federation.audit
)

marks = sa.Table(  # a few facts that hold for all gateways: federation.turns, federation.sharing
    "marks",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
operators = sa.Table(
    "operators",
    METADATA,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # SHA-256 of the token, hex
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("role", sa.String(16), nullable=False, server_default="admin"),
    sa.Column("revoked", sa.Float),
)
