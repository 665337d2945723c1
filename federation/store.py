"""The server's database: connections, transactions, migrations, the audit log.

SQLAlchemy Core; SQLite by default (one file, write-ahead log, ``synchronous=FULL``: what was
committed survives a power cut), PostgreSQL for several gateways (:mod:`federation.postgres`). Every
write runs in one transaction that waits for the writer before it, so that a kill leaves it wholly
there or not at all, and what it has read is still true when it writes.

The tables stand in :mod:`federation.tables`. ``audit`` only grows: triggers refuse to change or
delete a line, and each line carries a digest over all before it (:mod:`federation.audit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation import postgres, upgrading
from federation.audit import GENESIS, Line, Verdict, digest_of, verify
from federation.connecting import Connections, sqlite_engine
from federation.errors import FederationError
from federation.tables import METADATA, audit


class StoreError(FederationError):
    """The database cannot be opened, migrated or written; says what to do."""


class Store:
    """A database with the newest schema.

    Safe for threads, on SQLite for several processes, on PostgreSQL for several machines.

    Attributes:
        clock: Unix seconds.
        gateway: name of the process among those that share the database.
        shared: whether there may be others.
    """

    def __init__(
        self,
        engine: sa.Engine,
        clock: Callable[[], float] = time.time,
        gateway: str = "server",
    ) -> None:
        self.engine, self.clock, self.gateway = engine, clock, gateway
        self._connections = Connections(engine)
        self.shared = self._connections.shared

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Store:
        """Open or make the SQLite file and bring its schema up to date.

        Raises:
            StoreError: not writable, not a database, or made by a newer version.
        """
        engine = sqlite_engine(path)
        store = cls(engine, clock)
        try:
            store._upgrade(str(path))
        except (sa.exc.DatabaseError, StorageError) as error:
            engine.dispose()
            raise StoreError(
                f"cannot open the database {path}: {postgres.cause_of(error)}; check that the"
                " folder is writable and that the file is an AirPEFT database"
            ) from error
        return store

    @classmethod
    def connect(
        cls, url: sa.URL, gateway: str = "server", clock: Callable[[], float] = time.time
    ) -> Store:
        """Open a PostgreSQL database, which must exist, and bring its schema up to date.

        Args:
            url: see :func:`federation.postgres.read_address`.
            gateway: name of this process among those that share it.
            clock: Unix seconds.

        Raises:
            DatabaseError: psycopg is missing.
            StoreError: the database is not reached, not ours, or made by a newer version.
        """
        engine, where = postgres.make_engine(url), postgres.shown(url)
        store = cls(engine, clock, gateway)
        try:
            store._upgrade(where)
        except (sa.exc.DatabaseError, StorageError) as error:
            engine.dispose()
            raise StoreError(
                f"cannot open the database {where}: {postgres.cause_of(error)}; check that"
                " PostgreSQL runs there, that user and database exist (createdb), and the password:"
                " AIRPEFT_DATABASE_PASSWORD, --database-password-file or ~/.pgpass"
            ) from error
        return store

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent view.

        Raises:
            StorageError: the database cannot be read.
        """
        with self._connections.reading() as connection:
            yield connection

    @contextmanager
    def write(self, *, beside: bool = False) -> Iterator[sa.Connection]:
        """One transaction: committed and durable at the end, or nothing.

        Args:
            beside: it touches what belongs to one device, whose row it locks first, and may run
                beside others of its kind; it must not write to the audit log.

        Raises:
            StorageError: the disk is full or gone; nothing has changed.
        """
        with self._connections.writing() as connection:
            if self.shared:
                postgres.begin_write(connection, beside=beside)
            yield connection

    def log(self, connection: sa.Connection, who: str, action: str, subject: str, why: str) -> None:
        """Add a line to the audit log, in the transaction of what it tells of."""
        newest = sa.select(audit.c.number, audit.c.digest).order_by(audit.c.number.desc()).limit(1)
        last = connection.execute(newest).first()
        number, previous = (last.number, last.digest) if last else (0, GENESIS)
        words = (_text(who, 100), _text(action, 64), _text(subject, 200), _text(why))
        fields = (number + 1, self.clock(), *words)
        line = Line(*fields, digest_of(previous, *fields))
        connection.execute(audit.insert().values(line._asdict()))

    def announce(self, connection: sa.Connection, what: str, subject: str = "") -> None:
        """Tell the other gateways, if there are any, when this transaction is committed."""
        if self.shared:
            postgres.announce(connection, self.gateway, what, subject)

    def tell(self, what: str, subject: str = "") -> None:
        """Tell the other gateways at once; those that do not hear it look by themselves.

        Raises:
            StorageError: the database does not answer.
        """
        if self.shared:
            with self._connections.writing() as connection:
                postgres.hurry(connection)
                self.announce(connection, what, subject)

    def audit(self, limit: int = 200) -> list[dict[str, Any]]:
        """The newest lines of the audit log, newest first."""
        query = sa.select(audit).order_by(audit.c.number.desc()).limit(limit)
        with self.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def verify_audit(self, head: str | None = None) -> Verdict:
        """Whether the audit log is what was written, from its first line on.

        Args:
            head: a digest that was noted before and must still be part of it.
        """
        query = sa.select(*(audit.c[name] for name in Line._fields)).order_by(audit.c.number)
        with self.read() as connection:
            return verify((Line(*row) for row in connection.execute(query)), head)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _upgrade(self, where: str) -> None:
        with self.read() as connection:
            if upgrading.is_current(connection):
                return
        with self.write() as connection:
            trouble = upgrading.upgrade(connection, METADATA)
        if trouble:
            raise StoreError(
                f"the database {where} was made by a newer version ({trouble}): update airpeft"
            )


def _text(words: str, limit: int | None = None) -> str:
    """Words as every database takes them, and gives them back."""
    return words.replace("\0", "\N{REPLACEMENT CHARACTER}")[:limit]
