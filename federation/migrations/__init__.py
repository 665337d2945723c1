"""Alembic revisions of the server's database; :mod:`federation.store` runs them at every start."""
