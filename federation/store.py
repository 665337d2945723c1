"""The server's database: tables, connections, migrations.

SQLAlchemy Core; SQLite by default (one file, write-ahead log, ``synchronous=FULL``: what was
committed survives a power cut), PostgreSQL for several gateways (:mod:`federation.postgres`). Every
write runs in one transaction that waits for the writer before it, so that a kill leaves it wholly
there or not at all, and what it has read is still true when it writes.

The ``audit`` table only grows: triggers refuse to change or delete a line, and each line carries a
digest over all before it (:mod:`federation.audit`).
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
outcomes = sa.Table(  # a device's last word on a release in a rollout; reports tell more
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
