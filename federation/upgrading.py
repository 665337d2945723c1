"""Bringing a database's schema up to date: alembic, in one transaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from federation.migrations import HEAD


def is_current(connection: sa.Connection) -> bool:
    """Whether a database has the newest schema; then alembic need not be loaded."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return False
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version")
    return bool(found.scalar() == HEAD)


def upgrade(connection: sa.Connection, metadata: sa.MetaData) -> str:
    """Run what is missing, in the caller's transaction.

    Returns:
        Nothing; or why it cannot be, for a database of a newer version.
    """
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    script = ScriptDirectory.from_config(config)

    def steps(revision: Any, _context: Any) -> Any:
        return script._upgrade_revs("head", revision)

    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # a large fleet takes longer
    try:
        with EnvironmentContext(config, script, fn=steps) as environment:
            environment.configure(connection=connection, target_metadata=metadata)
            environment.run_migrations()
    except CommandError as error:
        return str(error)
    return ""
