"""PostgreSQL under the store: its address, its connections, its locks, its announcements.

Several gateways share one database. What SQLite gives by having one writer is given here by
advisory locks, which PostgreSQL releases by itself when a gateway's connection ends, however it
ends: a write holds :data:`WRITE` alone, a write that touches one device only holds it beside
others. A connection that hangs is given up by both sides after about 20 seconds (``KEEPALIVE``),
and so is a transaction that does nothing for half a minute: no gateway waits for a dead one longer.

``LISTEN`` and ``NOTIFY`` only make the others look sooner. They carry no state: whoever was away
looks at everything when it is back.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation.errors import FederationError

if TYPE_CHECKING:
    import psycopg

DRIVER = "postgresql+psycopg"
CHANNEL = "airpeft"
SPACE, NAMES = 0x41495250, 0x41495247  # two spaces of advisory locks: "AIRP", "AIRG"
WRITE, DECIDER = 1, 2  # in SPACE; in NAMES there is one for each gateway that is alive
KEEPALIVE = {"idle": 10, "interval": 5, "count": 2}  # seconds, seconds, tries
POOL, WAIT = 8, 10  # connections kept (as many again under load), seconds to wait for one
READING = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
_SETTINGS = {
    "statement_timeout": "30s",
    "lock_timeout": "15s",
    "idle_in_transaction_session_timeout": "30s",
    **{f"tcp_keepalives_{name}": str(value) for name, value in KEEPALIVE.items()},
}


class DatabaseError(FederationError):
    """An address that is none, or a database that cannot be used; says what to do."""


class DatabaseAwayError(StorageError):
    """The database does not answer at the moment; nothing has changed, or all of it has."""


def read_address(text: str, password: str | None = None) -> sa.URL:
    """The address of a database, such as ``postgresql+psycopg://fleet@db.example.org/airpeft``.

    Args:
        text: as an operator writes it.
        password: from a file or from the environment; it goes before one in the address.

    Raises:
        DatabaseError: it is no address, or of something else than PostgreSQL.
    """
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise DatabaseError(
            "--database is no address: write it as postgresql+psycopg://USER@HOST:PORT/NAME"
        ) from None
    if url.drivername not in (DRIVER, "postgresql"):
        raise DatabaseError(
            f"--database {url.drivername}://...: allowed is {DRIVER}://USER@HOST:PORT/NAME; without"
            " --database the server keeps an SQLite file in its home"
        )
    if not url.database:
        raise DatabaseError(f"--database {shown(url)} names no database: add /NAME")
    return url.set(drivername=DRIVER, password=password or url.password)


def shown(url: sa.URL) -> str:
    """An address for people, without its password."""
    query = {key: value for key, value in url.query.items() if key != "password"}
    return url.set(query=query).render_as_string(hide_password=True)


def has_password(text: str) -> bool:
    """Whether an address carries one, which would be seen in the list of processes.

    >>> has_password("postgresql+psycopg://fleet:secret@db/airpeft")
    True
    """
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        return False
    return url.password is not None or any(key.endswith("password") for key in url.query)


def make_engine(url: sa.URL) -> sa.Engine:
    """A pool of connections to a database; none is made yet.

    Raises:
        DatabaseError: psycopg is not installed.
    """
    arguments: dict[str, Any] = {
        "application_name": "airpeft",
        "connect_timeout": 5,
        "tcp_user_timeout": 20_000,
        "options": " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items()),
        **{f"keepalives_{name}": value for name, value in KEEPALIVE.items()},
    }
    given = {key: value for key, value in arguments.items() if key not in url.query}
    try:
        return sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_size=POOL,
            max_overflow=POOL,
            pool_timeout=WAIT,
            connect_args=given,
        )
    except ImportError:
        raise DatabaseError(
            "PostgreSQL needs psycopg, which is not installed: pip install 'airpeft[postgres]'"
        ) from None


def begin_write(connection: sa.Connection, *, beside: bool) -> None:
    """Take the place of the one writer, or a place beside others, until the transaction ends."""
    kind = "_shared" if beside else ""
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock{kind}({SPACE}, {WRITE})")


def hurry(connection: sa.Connection) -> None:
    """This transaction holds nothing that must survive a power cut: don't wait for the disk."""
    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def announce(connection: sa.Connection, sender: str, what: str, subject: str) -> None:
    """Tell all gateways, when and if this transaction is committed."""
    words = f"{sender} {what} {subject}"
    connection.execute(sa.select(sa.func.pg_notify(CHANNEL, words)))


def names_alive(connection: sa.Connection) -> frozenset[int]:
    """Numbers (:func:`number_of`) of the gateways that hold their name now."""
    query = sa.text(
        "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :space"
        " AND objsubid = 2 AND database = (SELECT oid FROM pg_database"
        " WHERE datname = current_database())"
    )
    return frozenset(int(row[0]) for row in connection.execute(query, {"space": NAMES}))


def number_of(gateway: str) -> int:
    """What a gateway's name is among the locks: 32 bits.

    >>> number_of("west") == number_of("east")
    False
    """
    return zlib.crc32(gateway.encode())


def cause_of(error: BaseException) -> str:
    """What a driver says, on one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


class Session:
    """One connection that lasts: it hears announcements, and holds locks while it lives."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def listen(self) -> None:
        """Hear announcements from now on."""
        self._connection.execute(f"LISTEN {CHANNEL}")

    def heard(self, seconds: float) -> list[tuple[str, str, str]]:
        """Sender, what and subject of each announcement; waits so long for the first."""
        found = []
        for notice in self._connection.notifies(timeout=seconds, stop_after=1):
            sender, what, subject = notice.payload.split(" ", 2)
            found.append((sender, what, subject))
        return found

    def takes(self, space: int, number: int) -> bool:
        """Take a lock, if nobody has it, until this session ends."""
        number -= (number >> 31) << 32  # PostgreSQL counts in signed integers
        row = self._connection.execute(f"SELECT pg_try_advisory_lock({space}, {number})").fetchone()
        return bool(row and row[0])

    def ends_silent(self, space: int, number: int, seconds: float) -> bool:
        """End the session that holds a lock and has said nothing for so long, if there is one.

        A process that hangs keeps its connection, and the kernel answers for it.
        """
        query = (
            "SELECT count(pg_terminate_backend(pid))"
            " FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = %s"
            " AND objid = %s AND database = datid AND datname = current_database()"
            " AND pid <> pg_backend_pid() AND state_change < now() - make_interval(secs => %s)"
        )
        row = self._connection.execute(query, (space, number, seconds)).fetchone()
        return bool(row and row[0])

    def ping(self) -> None:
        """Find out whether the database still answers."""
        self._connection.execute("SELECT 1")


@contextmanager
def session(engine: sa.Engine) -> Iterator[Session]:
    """A connection of its own, outside of the pool.

    Raises:
        DatabaseAwayError: the database does not answer, or stops to.
    """
    import psycopg

    where = shown(engine.url)
    try:
        taken = engine.raw_connection()
        taken.detach()
        connection: Any = taken.dbapi_connection
        try:
            connection.rollback()
            connection.autocommit = True
            yield Session(connection)
        finally:
            connection.close()
    except (psycopg.Error, sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        raise DatabaseAwayError(
            f"the database {where} does not answer: {cause_of(error)}"
        ) from error
