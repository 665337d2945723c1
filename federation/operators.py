"""Who may use the operator's interface: bearer tokens with a role, stored as SHA-256 only.

role      may
--------  ------------------------------------------------------------------------------
viewer    look
approver  look, approve what another has started, and stop it (pause, abort, rollback)
operator  look, enrol, tag and revoke devices, publish releases, run rollouts; not approve
admin     all of it, and give out and take back tokens
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aggregation import durable
from federation import tables
from federation.errors import FederationError
from federation.store import Store

ADMIN = "admin"
TOKEN_FILE = "admin.token"  # noqa: S105  (a file name)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z", re.ASCII)


class Role(StrEnum):
    """What a token is for; see the table in the module's docstring."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    ADMIN = "admin"


class Right(StrEnum):
    """What a call of the interface needs."""

    LOOK = "look"
    OPERATE = "operate"
    APPROVE = "approve"
    STOP = "stop"
    ADMINISTER = "administer"


RIGHTS: dict[Role, frozenset[Right]] = {
    Role.VIEWER: frozenset({Right.LOOK}),
    Role.APPROVER: frozenset({Right.LOOK, Right.APPROVE, Right.STOP}),
    Role.OPERATOR: frozenset({Right.LOOK, Right.OPERATE, Right.STOP}),
    Role.ADMIN: frozenset(Right),
}


class OperatorsError(FederationError):
    """A token that cannot be given out or taken back; says why."""


@dataclass(frozen=True)
class Operator:
    """Whose token it is, and what for."""

    name: str
    role: Role

    def may(self, right: Right) -> bool:
        """Whether the role includes it."""
        return right in RIGHTS[self.role]


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
    with store.write() as connection:
        connection.execute(tables.operators.delete().where(tables.operators.c.name == ADMIN))
        _insert(connection, store, ADMIN, Role.ADMIN, token)
        store.log(connection, "server", "operator-token", ADMIN, "a new token was made")


def add_operator(store: Store, name: str, role: Role, *, who: str, why: str = "") -> str:
    """Give out a token; it is shown once, here.

    Raises:
        OperatorsError: the name is malformed or was ever given out: two people must never be one
            in the log.
    """
    if not _NAME.match(name):
        raise OperatorsError(
            f"operator name {name[:80]!r}: 1 to 63 lower-case letters, digits, dots, hyphens,"
            " underscores"
        )
    token = secrets.token_urlsafe(32)
    with store.write() as connection:
        if _row(connection, name) is not None:
            raise OperatorsError(f"there is or was an operator {name!r}: choose another name")
        _insert(connection, store, name, role, token)
        store.log(connection, who, "operator-add", name, f"{role}; {why}" if why else role.value)
    return token


def revoke_operator(store: Store, name: str, *, who: str, why: str = "") -> None:
    """Take a token back; it is worth nothing from now on.

    Raises:
        OperatorsError: no such operator, or it is the first one, or one's own.
    """
    if name in (ADMIN, who):
        raise OperatorsError(
            f"{name!r} cannot be revoked here: replace the first operator's token with"
            " airpeft server --new-admin-token, and have another admin revoke yours"
        )
    with store.write() as connection:
        row = _row(connection, name)
        if row is None or row["revoked"] is not None:
            raise OperatorsError(f"no operator {name!r}; see: airpeft operators list")
        update = tables.operators.update().where(tables.operators.c.name == name)
        connection.execute(update.values(revoked=store.clock()))
        store.log(connection, who, "operator-revoke", name, why)


def list_operators(store: Store) -> list[dict[str, Any]]:
    """All operators by name, without anything secret."""
    table = tables.operators
    query = sa.select(table.c.name, table.c.role, table.c.created, table.c.revoked)
    with store.read() as connection:
        return [dict(row) for row in connection.execute(query.order_by(table.c.name)).mappings()]


def operator_of(store: Store, token: str) -> Operator | None:
    """The operator whose token this is; looked up by digest, so that timing tells nothing."""
    table = tables.operators
    query = sa.select(table.c.name, table.c.role).where(table.c.digest == _digest(token))
    with store.read() as connection:
        row = connection.execute(query.where(table.c.revoked.is_(None))).first()
    return Operator(str(row.name), Role(row.role)) if row is not None else None


def _insert(connection: sa.Connection, store: Store, name: str, role: Role, token: str) -> None:
    row = {"name": name, "digest": _digest(token), "role": role.value, "created": store.clock()}
    connection.execute(tables.operators.insert().values(row))


def _row(connection: sa.Connection, name: str) -> dict[str, Any] | None:
    query = sa.select(tables.operators).where(tables.operators.c.name == name)
    row = connection.execute(query).mappings().first()
    return dict(row) if row is not None else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
