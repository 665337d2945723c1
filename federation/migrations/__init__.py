"""Alembic revisions of the server's database; :mod:`federation.store` runs them at every start."""

HEAD = "0004"
"""The newest revision; a database that has it starts without loading alembic."""
