"""The devices of the fleet: who they are, what they say, what is known of each.

A report counts only if the device that the certificate names has signed it with the key that it
enrolled with, and only once: ``sequence`` grows, and what is at or below the highest one stored is
acknowledged again without effect. The exact signed bytes of the newest reports are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.admitted import Admitted
from federation.errors import FederationError
from federation.facts import changed_tags, facts
from federation.filters import Filter
from federation.orders import FAILURES, Observation
from federation.presence import Presence
from federation.reports import ReportError, check_report, consequences, forget_old, keep_report
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

OUTCOMES = FAILURES | {DeviceEvent.COMMITTED}
PHASES = frozenset({DeviceEvent.DOWNLOADED, DeviceEvent.STAGED})
HIDDEN = frozenset({"certificate", "public_key", "gateway"})


class UnknownDeviceError(FederationError):
    """No such device."""


class Fleet:
    """What the server knows of its devices; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._admitted, self._presence = Admitted(store), Presence(store)

    def refresh(self, device_id: str | None = None) -> None:
        """Read again who is admitted; one device, or all of them.

        Raises:
            StorageError: the database cannot be read; what was known holds on.
        """
        self._admitted.refresh(device_id)

    def admits(self, device_id: str, serial: str) -> bool:
        """Whether this certificate is an enrolled device's, not expired and not revoked."""
        return self._admitted.admits(device_id, serial)

    def may_be_new(self, serial: str) -> bool:
        """Whether another gateway may have issued this certificate a moment ago."""
        return self._admitted.unasked(serial)

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
        with self._store.write(beside=True) as connection:
            device = _device(connection, device_id, lock=True)
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
            if new:
                forget_old(connection, device_id)
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
            away = self._presence.elsewhere(connection)
        found = []
        for row in rows:
            release = rollout.targets[rollout.arm(row["id"])].release
            known_facts = facts(self._plain(row, away), now)
            found.append(
                _observation(row, words.get((row["id"], release), {}), release, known_facts)
            )
        return found

    def phases(self, rollout_id: str) -> dict[str, str]:
        """How far each device has come with a rollout's release, before its outcome."""
        table = tables.reports
        query = sa.select(table.c.device_id, table.c.event).where(table.c.rollout == rollout_id)
        query = query.where(table.c.event.in_([one.value for one in PHASES]))
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(table.c.device_id, table.c.sequence))
            return {row.device_id: row.event for row in rows}

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
            away = self._presence.elsewhere(connection)
            rows = [self._plain(dict(row), away) for row in connection.execute(query).mappings()]
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
            away = self._presence.elsewhere(connection)
            plain = self._plain(_device(connection, device_id), away)
            reports = [dict(row) for row in connection.execute(query).mappings()]
        for report in reports:
            report["detail"] = decode_report(report.pop("body")).detail
            del report["signature"]
        return {**plain, "reports": reports}

    def begin(self) -> None:
        """Say that no stream is open here yet; see :meth:`connected`.

        Raises:
            StorageError: the database cannot be written.
        """
        self._presence.begin()

    def connected(self, device_id: str, timestamp_version: int) -> AbstractContextManager[None]:
        """While a device's stream is open, which also tells what metadata it has."""
        return self._presence.connected(device_id, timestamp_version)

    def flush(self) -> None:
        """Write what :meth:`connected` has gathered; on a full disk it stays in memory."""
        self._presence.flush()

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
                connection.execute(change.where(issued.c.revoked.is_(None)))
                since = sa.func.coalesce(tables.devices.c.revoked, now)  # said twice: the first
                connection.execute(_update(device_id).values(revoked=since))
                self._store.log(connection, who, "revoke", device_id, why)
            self._store.announce(connection, "revoked", device_id)
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

    def _plain(self, row: Mapping[str, Any], elsewhere: frozenset[str]) -> dict[str, Any]:
        """A device for people: without keys, and with whether its stream is open."""
        plain = {key: value for key, value in row.items() if key not in HIDDEN}
        name = str(row["id"])
        return {**plain, "connected": self._presence.here(name) or name in elsewhere}


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


def _device(connection: sa.Connection, device_id: str, *, lock: bool = False) -> dict[str, Any]:
    query = sa.select(tables.devices).where(tables.devices.c.id == device_id)
    if lock:
        query = query.with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise UnknownDeviceError(f"no device {device_id!r}; see: airpeft fleet list")
    return dict(row)


def _update(device_id: str) -> sa.Update:
    return tables.devices.update().where(tables.devices.c.id == device_id)
