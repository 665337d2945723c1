"""From SQLite to PostgreSQL, once: the first start with ``--database`` takes the home's file along.

All rows go over in one transaction, so that a kill leaves the file in force or the database. Then
the file is renamed: what has moved is never written again by mistake.
"""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa

from aggregation import durable
from federation import tables
from federation.errors import FederationError
from federation.store import Store

FILE = "fleet.sqlite"
MOVED = "fleet.sqlite.moved"
BATCH = 500  # rows

log = logging.getLogger("airpeft.federation.server")


class MovingError(FederationError):
    """A home whose state lies in two places, or elsewhere; says what to do."""


def check_not_moved(home: Path) -> None:
    """Refuse to begin anew where a fleet's state has moved to PostgreSQL.

    Raises:
        MovingError: it has.
    """
    if (home / MOVED).exists() and not (home / FILE).exists():
        raise MovingError(
            f"the state of the fleet in {home} has moved to PostgreSQL: start it with --database;"
            f" to go back to what it was before, rename {MOVED} to {FILE}"
        )


def move_in(store: Store, home: Path) -> None:
    """Copy the home's SQLite file, if there is one, into a database that is still empty.

    Args:
        store: PostgreSQL.
        home: held by this process.

    Raises:
        MovingError: both hold a fleet's state.
        StoreError, StorageError: the file cannot be read or the database not be written; nothing
            has changed.
    """
    file = home / FILE
    if not file.exists():
        return
    old = Store.open(file, store.clock)
    try:
        head, count = old.verify_audit().head, _copy(old, store, file)
        if count:
            log.info("%d rows of %s are in the database now, audit head %s", count, file, head)
    finally:
        old.close()
    try:
        file.rename(home / MOVED)
        durable.sync_folder(home)
    except OSError as error:
        raise durable.storage_error(file, error) from error


def _copy(old: Store, new: Store, file: Path) -> int:
    """The number of rows; 0 if they are there already, from a start that was killed."""
    count = 0
    with old.read() as source, new.write() as target:
        if target.execute(sa.select(tables.audit.c.number).limit(1)).first() is not None:
            mine, there = old.verify_audit(), new.verify_audit(old.verify_audit().head)
            if there.seen and mine.lines > 0:
                return 0
            raise MovingError(
                f"both {file} and the database hold a fleet: move the file away, or give an empty"
                " database"
            )
        target.execute(tables.marks.delete())
        for table in tables.METADATA.sorted_tables:
            for rows in source.execute(sa.select(table)).mappings().partitions(BATCH):
                target.execute(table.insert(), [dict(row) for row in rows])
                count += len(rows)
    return count
