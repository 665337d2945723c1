"""The file under a ledger: where it is, how SQLite opens it, and what is not one.

>>> locate("sqlite:///spent/ledger.sqlite").as_posix()
'spent/ledger.sqlite'
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import URL, Engine, make_url

from privacy.errors import PrivacyError

BUSY_SECONDS = 60.0
MAGIC = b"SQLite format 3\0"
TABLES = frozenset({"events", "head"})
WHERE = "a simulation keeps it in its run folder, a device beside its data, as ledger.sqlite"


class LedgerError(PrivacyError):
    """A ledger edited, truncated, locked, or not a ledger at all."""


def locate(path: Path | str) -> Path:
    """The file of a ledger.

    Args:
        path: a path, or a ``sqlite:///`` URL.

    Raises:
        LedgerError: if the URL is not that of a file.
    """
    if isinstance(path, str) and "://" in path:
        url = make_url(path)
        if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
            raise LedgerError(
                f"{url.render_as_string()}: a ledger is a file that outlives the process: give a "
                "path, or sqlite:///path"
            )
        return Path(str(url.database))
    return Path(path)


def open_engine(path: Path, *, read_only: bool) -> Engine:
    """An engine for the file: durable for writing, or unable to write.

    Args:
        path: the file; its folder is made for writing, nothing is made for reading.
        read_only: open what is there.

    Raises:
        LedgerError: if the folder cannot be made, or there is no ledger to read.
    """
    if not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be made: {error}; choose another") from error
        url = URL.create("sqlite", database=str(path))
    else:
        _check_file(path)
        query = {"mode": "ro", "uri": "true"}
        url = URL.create("sqlite", database=path.absolute().as_uri(), query=query)
    engine = sql.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    sql.event.listen(engine, "connect", _on_connect_to_read if read_only else _on_connect)
    sql.event.listen(engine, "begin", _on_begin)
    if read_only:
        _check_tables(path, engine)
    return engine


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise LedgerError(f"{path} is a folder: name the ledger's file; {WHERE}")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except FileNotFoundError:
        raise LedgerError(f"{path}: there is no ledger; {WHERE}") from None
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}; mend that") from error
    if start != MAGIC:
        raise LedgerError(
            f"{path}: not a ledger, or damaged at its beginning: it is no SQLite file. Name "
            f"another ({WHERE}), or restore it from a backup, with its -wal file"
        )


def _check_tables(path: Path, engine: Engine) -> None:
    try:
        found = set(sql.inspect(engine).get_table_names())
    except sql.exc.DatabaseError:
        return  # a ledger's own reading says what is damaged
    if not found >= TABLES:
        raise LedgerError(
            f"{path}: not a privacy ledger: it has no table {min(TABLES - found)!r}; {WHERE}"
        )


def _on_connect(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where _on_begin says, not at a guess
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # commit returns after fsync
    cursor.close()


def _on_connect_to_read(connection: Any, _: object) -> None:
    connection.isolation_level = None


def _on_begin(connection: sql.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
