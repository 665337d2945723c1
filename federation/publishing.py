"""From decided to published: the newest orders reach the repository, and stay fresh there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation import tables
from federation.orders import Orders
from federation.repository import PublishError, Repository
from federation.roles import LIFETIME
from federation.store import Store

log = logging.getLogger("airpeft.federation.ticker")


class Publisher:
    """Publishes what is decided; any gateway may, and doing it twice changes nothing.

    Args:
        store: the server's database.
        repository: opened with the online key.
        changed: called after the repository changed, from the calling thread.

    Attributes:
        trouble: why the last round could not be published; empty when all is well.
    """

    def __init__(self, store: Store, repository: Repository, changed: Callable[[], None]) -> None:
        self._store, self._repository, self._changed = store, repository, changed
        self.trouble = ""

    def publish(self) -> None:
        """Publish the newest round that was decided and not published, if there is one.

        Raises:
            StorageError: the database cannot be read or written; the next time does it.
        """
        table = tables.rounds
        query = sa.select(table).where(table.c.published.is_(None))
        with self._store.read() as connection:
            row = connection.execute(query.order_by(table.c.sequence.desc()).limit(1)).first()
        if row is None:
            return
        try:
            self._to_repository(row)
        except (PublishError, StorageError) as error:
            if str(error) != self.trouble:
                log.error("round %d is not published: %s", row.sequence, error)
            self.trouble = str(error)
            return
        self.trouble = ""
        self._changed()  # before the mark, so that a full disk doesn't keep devices waiting
        with self._store.write() as connection:
            done = table.update().where(table.c.sequence <= row.sequence)
            connection.execute(
                done.where(table.c.published.is_(None)).values(published=self._store.clock())
            )
            self._store.announce(connection, "repository")

    def _to_repository(self, row: Any) -> None:
        with self._repository.changing():  # another gateway may be at the same round
            if row.sequence > self._repository.round().sequence:
                document = Orders.from_mapping(row.orders).to_document(row.sequence, row.rollout)
                self._repository.publish_round(document, now=self._now())

    def keep_fresh(self) -> None:
        """Date the timestamp anew when a quarter of its life is over."""
        if not self._is_old():
            return
        try:
            with self._repository.changing():
                if not self._is_old():
                    return  # another gateway was quicker
                self._repository.refresh_timestamp(self._now())
        except StorageError as error:
            log.error("the timestamp is not refreshed: %s", error)
            return
        self._changed()
        self._store.tell("repository")

    def _is_old(self) -> bool:
        old = LIFETIME["timestamp"] * 3 / 4
        return any(
            expiry.role == "timestamp" and expiry.expires - self._now() < old
            for expiry in self._repository.expiries()
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._store.clock(), UTC)
