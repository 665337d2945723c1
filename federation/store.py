"""The server's database: tables, connections, migrations.

SQLAlchemy Core; SQLite by default (one file, write-ahead log, ``synchronous=FULL``: what was
committed survives a power cut). Every write runs in one immediate transaction, so that a kill
leaves it wholly there or not at all, and two writers wait for one another instead of failing.

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
from federation.audit import GENESIS, Line, Verdict, digest_of, verify
from federation.errors import FederationError
from federation.migrations import HEAD

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
outcomes = sa.Table(  # a device's last word on a release in a rollout; reports tell the whole story
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

operators = sa.Table(
    "operators",
    METADATA,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # SHA-256 of the token, hex
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("role", sa.String(16), nullable=False, server_default="admin"),
    sa.Column("revoked", sa.Float),
)

_WRITE = "airpeft_write"


class StoreError(FederationError):
    """The database cannot be opened, migrated or written; says what to do."""


class Store:
    """A database with the newest schema.

    Safe for threads, and on SQLite for several processes.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self.clock = clock

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> Store:
        """Open or make the SQLite file and bring its schema up to date.

        Raises:
            StoreError: not writable, not a database, or made by a newer version.
        """
        engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(engine, "connect", _prepare)
        sa.event.listen(engine, "begin", _begin)
        store = cls(engine, clock)
        try:
            store._migrate(path)
        except sa.exc.DatabaseError as error:
            engine.dispose()
            raise StoreError(
                f"cannot open the database {path}: {error.orig}; check that the folder is"
                " writable and that the file is an AirPEFT database"
            ) from error
        return store

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent view."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed and durable at the end, or nothing.

        Raises:
            StorageError: the disk is full or gone; nothing has changed.
        """
        try:
            writing = self._engine.execution_options(**{_WRITE: True})
            with writing.begin() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            raise StorageError(
                f"cannot write to {self._engine.url.database}: {error.orig}; check that the folder"
                " is writable and the disk not full, then try again"
            ) from error

    def log(self, connection: sa.Connection, who: str, action: str, subject: str, why: str) -> None:
        """Add a line to the audit log, in the transaction of what it tells of."""
        newest = sa.select(audit.c.number, audit.c.digest).order_by(audit.c.number.desc()).limit(1)
        last = connection.execute(newest).first()
        number, previous = (last.number, last.digest) if last else (0, GENESIS)
        fields = (number + 1, self.clock(), who, action, subject, why)
        line = Line(*fields, digest_of(previous, *fields))
        connection.execute(audit.insert().values(line._asdict()))

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
        self._engine.dispose()

    def _migrate(self, path: Path) -> None:
        with self.read() as connection:
            if sa.inspect(connection).has_table("alembic_version"):
                found = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
                if found.scalar() == HEAD:
                    return
        from alembic.config import Config
        from alembic.runtime.environment import EnvironmentContext
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        script = ScriptDirectory.from_config(config)

        def upgrade(revision: Any, _context: Any) -> Any:
            return script._upgrade_revs("head", revision)

        try:
            with (
                self.write() as connection,
                EnvironmentContext(config, script, fn=upgrade) as environment,
            ):
                environment.configure(connection=connection, target_metadata=METADATA)
                environment.run_migrations()
        except CommandError as error:
            raise StoreError(
                f"the database {path} was made by a newer version ({error}): update airpeft"
            ) from error
        except StorageError as error:
            raise StoreError(f"cannot open the database {path}: {error}") from error


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
