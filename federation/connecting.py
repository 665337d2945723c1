"""Transactions on a database: how each begins, how a lost one is told, how long one waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation import postgres

_WRITE = "airpeft_write"
_PAUSES = (0.1, 0.4, 1.0, None)  # seconds between attempts to connect
_QUIET = 1.0  # seconds after these in which nobody waits again
_NO_SPACE = "53100"  # SQLSTATE disk_full
_LOST = (  # a connection, a place in a queue, a transaction that took too long
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
)


def sqlite_engine(path: Path) -> sa.Engine:
    """Connections to a file, with a write-ahead log and full durability."""
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    sa.event.listen(engine, "connect", _prepare)
    sa.event.listen(engine, "begin", _begin)
    return engine


class Connections:
    """The transactions of one process; safe for threads.

    Attributes:
        engine: its pool.
        shared: whether other processes may be at work on the same database.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.shared = engine.dialect.name == "postgresql"
        self._reader = engine.execution_options(**(postgres.READING if self.shared else {}))
        self._writer = engine.execution_options(**{_WRITE: True})
        self._away_until = 0.0

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A consistent view.

        Raises:
            StorageError: the database cannot be read.
        """
        with self._told("read"), self._connected(self._reader) as one, one.begin():
            yield one

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction: committed and durable at the end, or nothing.

        Raises:
            StorageError: the disk is full or gone, or the database is away.
        """
        with self._told("write to"), self._connected(self._writer) as one, one.begin():
            yield one

    @contextmanager
    def _connected(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        """A connection; a database that is just starting is waited for, but not by everybody."""
        for pause in _PAUSES:
            try:
                connection = engine.connect()
                break
            except sa.exc.OperationalError:
                now = time.monotonic()
                if pause is None:
                    self._away_until = now + _QUIET
                if pause is None or not self.shared or now < self._away_until:
                    raise
                time.sleep(pause)
        with connection:
            yield connection

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """The driver's errors as ours."""
        try:
            yield
        except _LOST as error:
            cause = postgres.cause_of(error)
            if self.shared and getattr(getattr(error, "orig", None), "sqlstate", "") != _NO_SPACE:
                where = postgres.shown(self.engine.url)
                raise postgres.DatabaseAwayError(
                    f"cannot {verb} the database {where}: {cause}; it is tried again"
                ) from error
            raise StorageError(
                f"cannot {verb} {self.engine.url.database}: {cause}; check that the folder"
                " is writable and the disk not full, then try again"
            ) from error


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are ours: see _begin
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    # A deferred transaction that reads and then writes fails with "database is locked" instead of
    # waiting its turn.
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
