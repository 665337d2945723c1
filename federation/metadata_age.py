"""How long a device has lacked newer metadata: the sign of one that is held back.

A device that is connected and heard may still be frozen by somebody in between, or refuse what it
is sent; one that comes back after weeks says what it has seen. The server writes down when each
version of the timestamp was first current (a few a day), and compares with what a device said when
it opened its stream, and with what it was sent since.

>>> age(7, [(3, 100.0), (7, 200.0), (8, 260.0), (9, 300.0)], now=320.0)
60.0
>>> age(9, [(3, 100.0), (9, 300.0)], now=320.0), age(0, [(3, 100.0)], now=320.0)
(0.0, None)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.store import Store

KEPT = 400 * 86_400.0  # seconds that versions are remembered


def age(version: int, dates: Sequence[tuple[int, float]], now: float) -> float | None:
    """Seconds for which something newer than ``version`` has been current; None if unknown.

    Args:
        version: of the timestamp that a device has; 0 if it never said.
        dates: versions with the Unix time at which each was first current, ascending.
        now: Unix seconds.
    """
    if version == 0:
        return None
    newer = next((since for number, since in dates if number > version), None)
    return 0.0 if newer is None else max(0.0, now - newer)


class Dates:
    """When versions of the timestamp became current, and which one each device was sent last.

    Args:
        store: the server's database.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._sent: dict[str, int] = {}
        self._dates = self._read()

    def note(self, version: int, *, write: bool = True) -> None:
        """This version is current now; new or not.

        Args:
            version: of the timestamp.
            write: whether this gateway writes it down; of several, one does.

        Raises:
            StorageError: it could not be written down.
        """
        with self._lock:
            if self._dates and self._dates[-1][0] == version:
                return
            self._dates = self._read()  # another gateway may have written it down
            if not write or (self._dates and self._dates[-1][0] == version):
                return
            now, table = self._store.clock(), tables.timestamps
            with self._store.write() as connection:
                # Numbers begin anew after a thief has run them up.
                connection.execute(table.delete().where(table.c.version >= version))
                connection.execute(table.delete().where(table.c.since < now - KEPT))
                connection.execute(table.insert().values(version=version, since=now))
            self._dates = self._read()

    def sent(self, device_id: str, version: int) -> None:
        """A device has said that it has this version, or has been sent it."""
        self._sent[device_id] = version

    def hours(self, device: Mapping[str, Any]) -> float | None:
        """How long a device has lacked newer metadata; None for one that never said what it has.

        Args:
            device: its row, for people.
        """
        version = self._sent.get(device["id"], device["timestamp_version"])
        found = age(version, self._dates, self._store.clock())
        return None if found is None else found / 3600

    def _read(self) -> list[tuple[int, float]]:
        table = tables.timestamps
        query = sa.select(table.c.version, table.c.since).order_by(table.c.version)
        with self._store.read() as connection:
            return [(int(row.version), float(row.since)) for row in connection.execute(query)]
