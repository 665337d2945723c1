"""The devices of the fleet: who they are, what they say, what is known of each.

A report counts only if the device that the certificate names has signed it with the key that it
enrolled with, and only once: ``sequence`` grows, and what is at or below the highest one stored is
acknowledged again without effect. The exact signed bytes are kept.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from aggregation.durable import StorageError
from federation import store as tables
from federation.errors import FederationError
from federation.facts import changed_tags, facts
from federation.filters import Filter
from federation.orders import FAILURES, Observation
from federation.reports import ReportError, check_report, consequences, keep_report
from federation.rollout import Rollout
from federation.store import Store
from protos.messages import (
    DeviceEvent,
    Health,
    Quality,
    RejectReason,
    Report,
    SignedReport,
    decode_report,
)

log = logging.getLogger("airpeft.federation.fleet")

OUTCOMES = FAILURES | {DeviceEvent.COMMITTED}
HIDDEN = frozenset({"certificate", "public_key"})
FORGOTTEN = 400 * 86_400.0  # seconds after its end a certificate is not even kept in memory


class UnknownDeviceError(FederationError):
    """No such device."""


class Fleet:
    """What the server knows of its devices; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # serial: (device, expiry); of active devices, read on every call and wake of a device
        self._serials: dict[str, tuple[str, float]] = {}
        self._held: dict[str, set[str]] = {}  # serials by device
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._streams: Counter[str] = Counter()
        self._seen: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self, device_id: str | None = None) -> None:
        """Read again who is admitted; one device, or all of them."""
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
            for serial in self._held.pop(device_id or "", ()):
                self._serials.pop(serial, None)
            self._serials.update(found)
            for serial, (owner, _) in found.items():
                self._held.setdefault(owner, set()).add(serial)

    def admits(self, device_id: str, serial: str) -> bool:
        """Whether this certificate is an enrolled device's, not expired and not revoked."""
        known = self._serials.get(serial)
        return known is not None and known[0] == device_id and self._store.clock() < known[1]

    def observe(self, device_id: str, signed: Sequence[SignedReport]) -> tuple[int, list[Report]]:
        """Take in reports, oldest first.

        Args:
            device_id: as the certificate says.
            signed: as received.

        Returns:
            The highest sequence that is durable now, and the reports that were new.

        Raises:
            ReportError: one is malformed, of another device, or not signed by this one's key;
                those before it are durable.
            UnknownDeviceError: no such device.
            StorageError: nothing of the batch is durable.
        """
        new: list[Report] = []
        news: dict[str, Any] = {}
        refused: ReportError | None = None
        with self._store.write() as connection:
            device = _device(connection, device_id)
            last = int(device["last_sequence"])
            for one in signed:
                try:
                    report = check_report(one, device_id, device["public_key"])
                except ReportError as error:
                    refused = error
                    break
                if report.sequence <= last:
                    continue
                keep_report(connection, report, one, self._store.clock(), device)
                device |= (changes := consequences(device, report))
                news |= changes
                last = report.sequence
                new.append(report)
            news |= {"last_sequence": last, "last_seen": self._store.clock()}
            connection.execute(_update(device_id).values(news))
        if refused is not None:
            raise refused
        return last, new

    def observations(self, rollout: Rollout) -> list[Observation]:
        """One for each active device, as :func:`federation.rollout.decide` wants them."""
        known, told = tables.devices, tables.outcomes
        query = sa.select(told).where(told.c.rollout == rollout.id)
        devices = sa.select(*(c for c in known.c if c.name not in HIDDEN))
        devices = devices.where(known.c.revoked.is_(None)).order_by(known.c.id)
        now = self._store.clock()
        with self._store.read() as connection:
            words = {
                (row["device_id"], row["release"]): dict(row)
                for row in connection.execute(query).mappings()
            }
            rows = [dict(row) for row in connection.execute(devices).mappings()]
        found = []
        for row in rows:
            release = rollout.targets[rollout.arm(row["id"])].release
            known_facts = facts(self._plain(row), now)
            found.append(
                _observation(row, words.get((row["id"], release), {}), release, known_facts)
            )
        return found

    def outcomes(self, rollout_id: str) -> list[dict[str, Any]]:
        """Each device's last word on a rollout, for people."""
        query = sa.select(tables.outcomes).where(tables.outcomes.c.rollout == rollout_id)
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(tables.outcomes.c.received)).mappings()
            return [dict(row) for row in rows]

    def devices(self, where: Filter | None = None) -> list[dict[str, Any]]:
        """All devices by name, the revoked ones too; or those that a filter means."""
        self.flush()
        query = sa.select(tables.devices).order_by(tables.devices.c.id)
        now = self._store.clock()
        with self._store.read() as connection:
            rows = [self._plain(dict(row)) for row in connection.execute(query).mappings()]
        return [row for row in rows if where is None or where.matches(facts(row, now))]

    def device(self, device_id: str) -> dict[str, Any]:
        """One device with its newest reports.

        Raises:
            UnknownDeviceError: no such device.
        """
        self.flush()
        table = tables.reports
        query = sa.select(table).where(table.c.device_id == device_id)
        query = query.order_by(table.c.sequence.desc()).limit(50)
        with self._store.read() as connection:
            plain = self._plain(_device(connection, device_id))
            reports = [dict(row) for row in connection.execute(query).mappings()]
        for report in reports:
            report["detail"] = decode_report(report.pop("body")).detail
            del report["signature"]
        return {**plain, "reports": reports}

    @contextmanager
    def connected(self, device_id: str, timestamp_version: int) -> Iterator[None]:
        """While a device's stream is open, which also tells what metadata it has.

        Kept in memory and written by :meth:`flush`: when a whole fleet reconnects at once, nobody
        waits for the disk.
        """
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

    def flush(self) -> None:
        """Write what :meth:`connected` has gathered; on a full disk it stays in memory."""
        with self._flushing:  # a reader flushes first, and must not overtake one in progress
            with self._lock:
                seen, self._seen = self._seen, {}
            try:
                self._write_seen(seen)
            except StorageError as error:
                log.error("when devices were seen is not stored: %s", error)
                with self._lock:
                    self._seen = {**seen, **self._seen}

    def _write_seen(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        if seen:
            with self._store.write() as connection:
                for device_id, changes in seen.items():
                    connection.execute(_update(device_id).values(changes))

    def revoke(self, device_id: str, *, who: str, why: str, serial: str | None = None) -> None:
        """Never admit this device again, and count it for nothing; or one certificate of it.

        Args:
            device_id: the device.
            who: the operator, for the audit log.
            why: likewise.
            serial: only this certificate (hex): the device may renew with its key.

        Raises:
            UnknownDeviceError: no such device, or no such certificate of it.
        """
        issued, now = tables.certificates, self._store.clock()
        with self._store.write() as connection:
            _device(connection, device_id)
            change = issued.update().where(issued.c.device_id == device_id).values(revoked=now)
            if serial is not None:
                if connection.execute(change.where(issued.c.serial == serial)).rowcount == 0:
                    raise UnknownDeviceError(f"{device_id} has no certificate {serial[:64]!r}")
                self._store.log(connection, who, "revoke", f"{device_id} {serial}", why)
            else:
                connection.execute(change)
                connection.execute(_update(device_id).values(revoked=now))
                self._store.log(connection, who, "revoke", device_id, why)
        self.refresh(device_id)

    def tag(
        self, device_id: str, changes: Mapping[str, str | None], *, who: str, why: str = ""
    ) -> None:
        """Set tags of a device; None takes one away.

        Raises:
            UnknownDeviceError: no such device.
            TagError: a name or a value out of bounds, or too many tags.
        """
        with self._store.write() as connection:
            tags = changed_tags(_device(connection, device_id)["tags"], changes)
            connection.execute(_update(device_id).values(tags=tags))
            said = ", ".join(
                f"{name}={value}" if value is not None else f"no {name}"
                for name, value in changes.items()
            )
            self._store.log(connection, who, "tag", device_id, f"{said}; {why}" if why else said)

    def _plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A device for people: without keys, and with whether its stream is open."""
        plain = {key: value for key, value in row.items() if key not in HIDDEN}
        return {**plain, "connected": self._streams[str(row["id"])] > 0}


def _observation(
    device: Mapping[str, Any], word: Mapping[str, Any], release: str, known: Mapping[str, Any]
) -> Observation:
    event = DeviceEvent(word["event"]) if word else None
    if event is None and device["running"] == release:
        event = DeviceEvent.COMMITTED  # it had the release before this rollout, and says no more
    before, after = word.get("health_before"), word.get("health_after")
    return Observation(
        device_id=device["id"],
        outcome=event,
        reason=RejectReason(word["reason"]) if word.get("reason") else None,
        attempts=word.get("attempts", 1),
        quality=Quality(**word["quality"]) if word.get("quality") else None,
        health_before=Health(**before) if before else None,
        health_after=Health(**after) if after else None,
        running=device["running"],
        facts=known,
    )


def _device(connection: sa.Connection, device_id: str) -> dict[str, Any]:
    query = sa.select(tables.devices).where(tables.devices.c.id == device_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise UnknownDeviceError(f"no device {device_id!r}; see: airpeft fleet list")
    return dict(row)


def _update(device_id: str) -> sa.Update:
    return tables.devices.update().where(tables.devices.c.id == device_id)
