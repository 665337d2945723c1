"""A database and a home belong together: both are of one fleet, or a gateway does not start."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa

from federation import tables
from federation.errors import FederationError
from federation.store import Store

AUTHORITY = "authority"


class SharingError(FederationError):
    """A database of another fleet."""


def check_same_fleet(store: Store, authority: bytes) -> None:
    """Refuse a database of another fleet; the first gateway of all says which one it is.

    Args:
        store: the database.
        authority: certificate (PEM) of the fleet's authority, from the home.

    Raises:
        SharingError: another authority made the devices in this database.
        StorageError: the database cannot be written.
    """
    mine, table = hashlib.sha256(authority).hexdigest(), tables.marks
    query = sa.select(table.c.value).where(table.c.name == AUTHORITY)
    with store.write() as connection:
        known = connection.execute(query).scalar()
        if known is None:
            connection.execute(table.insert().values(name=AUTHORITY, value=mine))
        elif known != mine:
            raise SharingError(
                f"this database belongs to a fleet with the authority {known[:12]}, and the home"
                f" has {mine[:12]}: all gateways share one --home (a folder that each of them"
                " sees), and each fleet has a database of its own"
            )
