"""The devices of the fleet: who they are, what they say, what is known of each.

A report counts only if the device that the certificate names has signed it with the key that it
enrolled with, and only once: ``sequence`` grows, and what is at or below the highest one stored is
acknowledged again without effect. The exact signed bytes are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy.dialects import sqlite

from federation import store as tables
from federation.errors import FederationError
from federation.orders import FAILURES, Observation
from federation.rollout import Rollout
from federation.store import Store
from protos.errors import WireError
from protos.messages import (
    DeviceEvent,
    Quality,
    RejectReason,
    Report,
    SignedReport,
    decode_report,
)

OUTCOMES = FAILURES | {DeviceEvent.COMMITTED}


class ReportReason(StrEnum):
    """Why a report was refused."""

    MALFORMED = "malformed"
    WRONG_DEVICE = "wrong-device"
    SIGNATURE = "signature"


class ReportError(FederationError):
    """A report that is not what it claims to be."""

    def __init__(self, reason: ReportReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class UnknownDeviceError(FederationError):
    """No such device."""


class Fleet:
    """What the server knows of its devices; safe for threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._serials: dict[str, str] = {}  # of active devices; read on every call of a device
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read again who is admitted."""
        columns = (tables.devices.c.id, tables.devices.c.serial)
        query = sa.select(*columns).where(tables.devices.c.revoked.is_(None))
        with self._store.read() as connection:
            serials = {row.id: row.serial for row in connection.execute(query)}
        with self._lock:
            self._serials = serials

    def admits(self, device_id: str, serial: str) -> bool:
        """Whether this certificate belongs to an enrolled device and is not revoked."""
        return self._serials.get(device_id) == serial

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
        refused: ReportError | None = None
        with self._store.write() as connection:
            device = _device(connection, device_id)
            last = int(device["last_sequence"])
            key = serialization.load_der_public_key(device["public_key"])
            for one in signed:
                try:
                    report = _checked(one, device_id, key)
                except ReportError as error:
                    refused = error
                    break
                if report.sequence <= last:
                    continue
                self._keep(connection, device, report, one)
                last = report.sequence
                new.append(report)
            changes = {"last_sequence": last, "last_seen": self._store.clock()}
            connection.execute(_update(device_id).values(changes))
        if refused is not None:
            raise refused
        return last, new

    def observations(self, rollout: Rollout) -> list[Observation]:
        """One for each active device, as :func:`federation.rollout.decide` wants them."""
        known, told = tables.devices, tables.outcomes
        match = sa.and_(
            told.c.device_id == known.c.id,
            told.c.rollout == rollout.id,
            told.c.release == rollout.release.release,
        )
        columns = (known.c.id, known.c.running, told.c.event, told.c.reason, told.c.quality)
        query = sa.select(*columns).select_from(known.outerjoin(told, match))
        query = query.where(known.c.revoked.is_(None)).order_by(known.c.id)
        with self._store.read() as connection:
            return [
                _observation(dict(row), rollout) for row in connection.execute(query).mappings()
            ]

    def outcomes(self, rollout_id: str) -> list[dict[str, Any]]:
        """Each device's last word on a rollout, for people."""
        query = sa.select(tables.outcomes).where(tables.outcomes.c.rollout == rollout_id)
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(tables.outcomes.c.received)).mappings()
            return [dict(row) for row in rows]

    def devices(self) -> list[dict[str, Any]]:
        """All devices by name, the revoked ones too."""
        query = sa.select(tables.devices).order_by(tables.devices.c.id)
        with self._store.read() as connection:
            return [_plain(dict(row)) for row in connection.execute(query).mappings()]

    def device(self, device_id: str) -> dict[str, Any]:
        """One device with its newest reports.

        Raises:
            UnknownDeviceError: no such device.
        """
        table = tables.reports
        query = sa.select(table).where(table.c.device_id == device_id)
        query = query.order_by(table.c.sequence.desc()).limit(50)
        with self._store.read() as connection:
            plain = _plain(_device(connection, device_id))
            reports = [dict(row) for row in connection.execute(query).mappings()]
        for report in reports:
            report["detail"] = decode_report(report.pop("body")).detail
            del report["signature"]
        return {**plain, "reports": reports}

    def saw(self, device_id: str, timestamp_version: int) -> None:
        """A device opened its stream and says which metadata it has."""
        changes: dict[str, Any] = {
            "last_seen": self._store.clock(),
            "timestamp_version": timestamp_version,
        }
        with self._store.write() as connection:
            connection.execute(_update(device_id).values(changes))

    def revoke(self, device_id: str, *, who: str, why: str) -> None:
        """Never admit this device again, and count it for nothing.

        Raises:
            UnknownDeviceError: no such device.
        """
        with self._store.write() as connection:
            _device(connection, device_id)
            connection.execute(_update(device_id).values(revoked=self._store.clock()))
            self._store.log(connection, who, "revoke", device_id, why)
        self.refresh()

    def _keep(
        self, connection: sa.Connection, device: dict[str, Any], report: Report, one: SignedReport
    ) -> None:
        now = self._store.clock()
        row = {
            "device_id": report.device_id,
            "sequence": report.sequence,
            "received": now,
            "event": report.event.value,
            "release": report.release,
            "rollout": report.rollout,
            "reason": report.reason.value if report.reason else None,
            "body": one.body,
            "signature": one.signature,
        }
        connection.execute(tables.reports.insert().values(row))
        changes = _consequences(device, report)
        if changes:
            device.update(changes)
            connection.execute(_update(report.device_id).values(changes))
        if report.event in OUTCOMES and report.rollout:
            outcome = {
                key: row[key] for key in ("device_id", "event", "release", "reason", "received")
            } | {
                "rollout": report.rollout,
                "detail": report.detail,
                "quality": asdict(report.quality) if report.quality else None,
                "payload_bytes": report.payload_bytes,
            }
            _upsert_outcome(connection, outcome)


def _checked(one: SignedReport, device_id: str, key: Any) -> Report:
    try:
        key.verify(one.signature, one.body, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise ReportError(
            ReportReason.SIGNATURE, f"not signed by the key that {device_id} enrolled with"
        ) from None
    try:
        report = decode_report(one.body)
    except WireError as error:
        raise ReportError(ReportReason.MALFORMED, str(error)) from error
    if report.device_id != device_id:
        raise ReportError(
            ReportReason.WRONG_DEVICE, f"{device_id} sent a report of {report.device_id!r}"
        )
    return report


def _consequences(device: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """What a report says about the device itself."""
    changes: dict[str, Any] = {}
    if report.event in (DeviceEvent.COMMITTED, DeviceEvent.STARTED):
        if report.release != device["running"]:
            changes |= {"running": report.release, "before": device["running"]}
    elif report.event is DeviceEvent.REVERTED and report.release == device["running"]:
        changes |= {"running": device["before"], "before": ""}
    if report.health is not None:
        changes["health"] = asdict(report.health)
    return changes


def _upsert_outcome(connection: sa.Connection, outcome: dict[str, Any]) -> None:
    key = ["rollout", "device_id", "release"]
    insert = sqlite.insert(tables.outcomes).values(outcome)
    changes = {name: value for name, value in outcome.items() if name not in key}
    connection.execute(insert.on_conflict_do_update(index_elements=key, set_=changes))


def _observation(row: Mapping[str, Any], rollout: Rollout) -> Observation:
    event = DeviceEvent(row["event"]) if row["event"] else None
    if event is None and row["running"] == rollout.release.release:
        event = DeviceEvent.COMMITTED  # it had the release before this rollout, and says no more
    return Observation(
        device_id=row["id"],
        outcome=event,
        reason=RejectReason(row["reason"]) if row["reason"] else None,
        quality=Quality(**row["quality"]) if row["quality"] else None,
        running=row["running"],
    )


def _device(connection: sa.Connection, device_id: str) -> dict[str, Any]:
    query = sa.select(tables.devices).where(tables.devices.c.id == device_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise UnknownDeviceError(f"no device {device_id!r}; see: airpeft fleet list")
    return dict(row)


def _update(device_id: str) -> sa.Update:
    return tables.devices.update().where(tables.devices.c.id == device_id)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    hidden = {"certificate", "public_key"}
    return {key: value for key, value in row.items() if key not in hidden}
