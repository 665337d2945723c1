"""Which certificates are admitted: in memory, for every call and wake of a device asks."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

import sqlalchemy as sa

from federation import tables
from federation.store import Store

AGAIN = 2.0  # seconds in which the database is not asked twice for the same certificate
FORGOTTEN = 400 * 86_400.0  # seconds after its end a certificate is not even kept in memory
REMEMBERED = 4096  # certificates that were asked for in vain


class Admitted:
    """The certificates of active devices, by serial; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._serials: dict[str, tuple[str, float]] = {}  # device and expiry
        self._held: dict[str, set[str]] = {}  # serials by device
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._asked: OrderedDict[str, float] = OrderedDict()
        self.refresh()

    def refresh(self, device_id: str | None = None) -> None:
        """Read again who is admitted; one device, or all of them.

        Raises:
            StorageError: the database cannot be read; what was known holds on.
        """
        devices, issued = tables.devices, tables.certificates
        query = sa.select(issued.c.serial, issued.c.device_id, issued.c.expires)
        query = query.join(devices, devices.c.id == issued.c.device_id)
        query = query.where(devices.c.revoked.is_(None), issued.c.revoked.is_(None))
        # :meth:`admits` asks the clock; one that is ahead now may be right in a minute.
        query = query.where(issued.c.expires > self._store.clock() - FORGOTTEN)
        if device_id is not None:
            query = query.where(issued.c.device_id == device_id)
        with self._lock, self._store.read() as connection:
            found = {r.serial: (r.device_id, r.expires) for r in connection.execute(query)}
            if device_id is None:
                self._serials, self._held = found, {}
            self._serials.update(found)  # before the others go: streams look at any moment
            for serial in self._held.pop(device_id or "", set()) - found.keys():
                self._serials.pop(serial, None)
            for serial, (owner, _) in found.items():
                self._held.setdefault(owner, set()).add(serial)

    def admits(self, device_id: str, serial: str) -> bool:
        """Whether this certificate is an enrolled device's, not expired and not revoked."""
        known = self._serials.get(serial)
        return known is not None and known[0] == device_id and self._store.clock() < known[1]

    def unasked(self, serial: str) -> bool:
        """Whether the database is worth asking for a certificate that is not admitted.

        Another gateway may have issued it a moment ago. It is not asked again and again: a device
        that was revoked may come as often as it likes.
        """
        now = time.monotonic()
        with self._asking:  # not the other lock, under which the database is read
            if not self._store.shared or now - self._asked.get(serial, float("-inf")) < AGAIN:
                return False
            self._asked[serial] = now
            while len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
            return True
