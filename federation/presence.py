"""Which devices' streams are open, and when a device was last heard of.

Kept in memory and written now and then: when a whole fleet reconnects at once, nobody waits for the
disk. Where several gateways share a database, each says at which one a stream is open; what a
gateway said that is not alive any more does not count.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation import postgres, tables
from federation.store import Store

log = logging.getLogger("airpeft.federation.fleet")


class Presence:
    """The open streams of one gateway, and what the others say of theirs; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._streams: Counter[str] = Counter()
        self._seen: dict[str, dict[str, Any]] = {}

    def begin(self) -> None:
        """No stream is open here: a gateway of this name that was killed could not say so.

        Raises:
            StorageError: the database cannot be written.
        """
        table = tables.devices
        with self._store.write() as connection:
            mine = table.update().where(table.c.gateway == self._store.gateway)
            connection.execute(mine.values(gateway=None))

    @contextmanager
    def connected(self, device_id: str, timestamp_version: int) -> Iterator[None]:
        """While a device's stream is open, which also tells what metadata it has."""
        with self._lock:
            self._streams[device_id] += 1
            self._seen[device_id] = {
                "last_seen": self._store.clock(),
                "timestamp_version": timestamp_version,
            }
        try:
            yield
        finally:
            with self._lock:
                self._streams[device_id] -= 1
                seen = self._seen.setdefault(device_id, {})
                seen["last_seen"] = self._store.clock()

    def here(self, device_id: str) -> bool:
        """Whether its stream is open at this gateway."""
        return self._streams[device_id] > 0

    def elsewhere(self, connection: sa.Connection) -> frozenset[str]:
        """Devices whose stream is open at another gateway that is alive."""
        if not self._store.shared:
            return frozenset()
        alive, table = postgres.names_alive(connection), tables.devices
        query = sa.select(table.c.id, table.c.gateway).where(table.c.gateway.is_not(None))
        rows = connection.execute(query.where(table.c.gateway != self._store.gateway))
        return frozenset(r.id for r in rows if postgres.number_of(r.gateway) in alive)

    def flush(self) -> None:
        """Write what was gathered; if that cannot be, it stays in memory."""
        with self._flushing:  # a reader flushes first, and must not overtake one in progress
            with self._lock:
                seen, self._seen = self._seen, {}
            try:
                self._write(seen)
            except StorageError as error:
                log.error("when devices were seen is not stored: %s", error)
                with self._lock:
                    self._seen = {**seen, **self._seen}

    def _write(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        if not seen:
            return
        table, me = tables.devices, self._store.gateway
        with self._store.write() as connection:
            for device_id, changes in sorted(seen.items()):
                one = table.update().where(table.c.id == device_id)
                here = {"gateway": me} if self.here(device_id) else {}
                connection.execute(one.values(**changes, **here))
                if not here:  # it may be at another one by now
                    connection.execute(one.where(table.c.gateway == me).values(gateway=None))
