"""The chain of a ledger: rows in SQLite, each with the hash of the one before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from privacy import ledger_rows as rows
from privacy.ledger_file import LedgerError, locate, open_engine
from privacy.ledger_rows import GENESIS, Entry, Limit


class LedgerEdited(LedgerError):  # noqa: N818 - says what happened
    """The chain of hashes does not hold: what was spent is no longer known."""


@dataclass(frozen=True)
class Head:
    """How many events there are, and the hash of the last one."""

    count: int
    hash: str


class Chain:
    """An open file of rows that are only ever added.

    Args:
        path: the SQLite file, made if it is missing; or a ``sqlite:///`` URL.
        now: seconds since 1970, for the record; nothing depends on it.
        read_only: look at a ledger that is there; make and change nothing.

    Raises:
        LedgerError: if the file is not a ledger, or, read-only, is not there.
        LedgerEdited: if it was edited or truncated.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        now: Callable[[], float] = time.time,
        read_only: bool = False,
    ) -> None:
        self.path = locate(path)
        self._now = now
        self.engine = open_engine(self.path, read_only=read_only)
        if not read_only:
            self._make_tables()
        self.verify()

    def _make_tables(self) -> None:
        with self._transaction() as connection:
            rows.metadata.create_all(connection)
            if connection.execute(sql.select(rows.head.c.id)).first() is None:
                query = sql.select(rows.events.c.number).limit(1)
                if connection.execute(query).first() is not None:
                    raise self._edited("the head is missing")
                connection.execute(
                    rows.head.insert().values(id=1, schema=rows.SCHEMA, count=0, hash=GENESIS)
                )

    def head(self) -> Head:
        """The number of rows and the last hash; kept elsewhere, it reveals a swapped file."""
        with self._transaction("BEGIN") as connection:
            return self._read_head(connection)

    def verify(self, *, since: Head | None = None) -> Head:
        """Check every hash from the first row to the head, and the file's indices against the rows.

        Args:
            since: an earlier head that must still be part of the chain.

        Raises:
            LedgerEdited: naming the first row that does not fit.
        """
        with self._transaction("BEGIN") as connection:
            head = self._read_head(connection)
            # A client's events are looked up by an index, which no hash covers.
            sound = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
            if sound != "ok":
                raise self._edited(sound.replace("\n", " "))
            query = sql.select(rows.events).order_by(rows.events.c.number)
            previous, count = GENESIS, 0
            for row in connection.execute(query).mappings():
                count += 1
                if row["number"] != count or row["previous"] != previous:
                    raise self._edited(f"event {row['number']} does not fit the one before it")
                self._read(row)
                previous = row["hash"]
                if since is not None and count == since.count and previous != since.hash:
                    raise self._edited(f"event {count} is not the one that was there before")
        if (count, previous) != (head.count, head.hash):
            raise self._edited(f"the head tells of {head.count} events, there are {count}")
        if since is not None and count < since.count:
            raise self._edited(f"{since.count} events were there before, now there are {count}")
        return head

    def close(self) -> None:
        """Close the connections; the file stays."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sql.Connection]:
        try:
            with (
                self.engine.connect().execution_options(begin=begin) as connection,
                connection.begin(),
            ):
                yield connection
        except sql.exc.OperationalError as error:
            raise LedgerError(
                f"{self.path}: cannot be used: {error.orig}. If another process holds it, wait for "
                "that; if the disk is full or the folder not writable, mend that"
            ) from error
        except sql.exc.DatabaseError as error:
            raise self._edited(str(error.orig)) from error

    def _append(self, connection: sql.Connection, values: dict[str, Any]) -> None:
        head = self._read_head(connection)
        row = {
            **values,
            "number": head.count + 1,
            "unix_micro": int(self._now() * 1_000_000),
            "previous": head.hash,
        }
        row["hash"] = rows.hash_of(row)
        connection.execute(rows.events.insert().values(**row))
        done = {"count": row["number"], "hash": row["hash"], "schema": rows.SCHEMA}
        connection.execute(rows.head.update().values(**done))

    def _read_head(self, connection: sql.Connection) -> Head:
        row = connection.execute(sql.select(rows.head)).mappings().first()
        if row is None:
            raise self._edited("the head is missing")
        if row["schema"] not in rows.READABLE:
            known = " and ".join(map(str, rows.READABLE))
            raise LedgerError(
                f"{self.path}: schema {row['schema']} was written by another version of AirPEFT; "
                f"this one reads schema {known}"
            )
        return Head(row["count"], row["hash"])

    def _read(self, row: Any) -> Entry | Limit:
        if row["hash"] != rows.hash_of(row):
            raise self._edited(f"event {row['number']} does not fit its hash")
        try:
            return rows.read(row)
        except rows.UNREADABLE as error:
            raise self._edited(f"event {row['number']} is not readable: {error}") from None

    def _edited(self, what: str) -> LedgerEdited:
        return LedgerEdited(
            f"{self.path}: the ledger was edited or damaged: {what}. Do not train with it: what "
            "was spent is no longer known. Restore the file from a backup, with its -wal file"
        )
