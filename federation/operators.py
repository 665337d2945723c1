"""Who may use the operator's interface: bearer tokens, stored as SHA-256 only."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import sqlalchemy as sa

from aggregation import durable
from federation import store as tables
from federation.store import Store

ADMIN = "admin"
TOKEN_FILE = "admin.token"  # noqa: S105  (a file name)


def ensure_admin(store: Store, home: Path) -> None:
    """Make the first operator at the first start, and leave its token in the home folder.

    The file may be moved away: the server keeps the digest. To replace a lost token, delete the
    file ``admin.token`` if it is there, and start the server with ``--new-admin-token``.

    Raises:
        StorageError: the folder cannot be written.
    """
    query = sa.select(tables.operators.c.name).where(tables.operators.c.name == ADMIN)
    with store.read() as connection:
        exists = connection.execute(query).first() is not None
    if not exists:
        renew_admin(store, home)


def renew_admin(store: Store, home: Path) -> None:
    """Give the first operator a fresh token; the old one is worth nothing from now on.

    Raises:
        StorageError: the folder cannot be written.
    """
    token = secrets.token_urlsafe(32)
    # The file first: a kill in between leaves a token that no digest knows, made again next time.
    durable.write_bytes(home / TOKEN_FILE, token.encode() + b"\n", mode=0o600)
    row = {"name": ADMIN, "digest": _digest(token), "created": store.clock()}
    with store.write() as connection:
        connection.execute(tables.operators.delete().where(tables.operators.c.name == ADMIN))
        connection.execute(tables.operators.insert().values(row))
        store.log(connection, "server", "operator-token", ADMIN, "a new token was made")


def operator_of(store: Store, token: str) -> str | None:
    """The operator whose token this is; looked up by digest, so that timing tells nothing."""
    query = sa.select(tables.operators.c.name).where(tables.operators.c.digest == _digest(token))
    with store.read() as connection:
        row = connection.execute(query).first()
    return str(row.name) if row is not None else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
