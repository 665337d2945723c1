"""Device reports: checking one, keeping one, and what it says about its device.

Works inside the caller's transaction; :mod:`federation.fleet` is the one that opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from federation import tables
from federation.errors import FederationError
from federation.orders import FAILURES
from protos.errors import WireError
from protos.messages import DeviceEvent, Report, SignedReport, decode_report

OUTCOMES = FAILURES | {DeviceEvent.COMMITTED}
HEALTH_KEPT = 50  # of one device: four hours of them, as often as devices send them
OTHERS_KEPT = 1_000  # of one device; its last word on each rollout stays in ``outcomes``
ROLLOUT_MAX = 64  # characters; a longer name is of no rollout of ours


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


def check_report(one: SignedReport, device_id: str, public_key: bytes) -> Report:
    """The report in a signed body, if this device has signed it.

    Args:
        one: as received.
        device_id: as the certificate says.
        public_key: that the device enrolled with; SubjectPublicKeyInfo, DER.

    Raises:
        ReportError: a wrong signature, another device's name, or a body out of bounds.
    """
    key = serialization.load_der_public_key(public_key)
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
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


def keep_report(
    connection: sa.Connection,
    report: Report,
    signed: SignedReport,
    now: float,
    device: Mapping[str, Any],
) -> None:
    """Store a report, and the device's last word on a rollout's release if it is one.

    Args:
        connection: in a transaction that writes.
        report: as checked.
        signed: as received.
        now: Unix seconds.
        device: its row before this report.
    """
    row = {
        "device_id": report.device_id,
        "sequence": report.sequence,
        "received": now,
        "event": report.event.value,
        "release": report.release,
        "rollout": report.rollout,
        "reason": report.reason.value if report.reason else None,
        "body": signed.body,
        "signature": signed.signature,
    }
    connection.execute(tables.reports.insert().values(row))
    told = tables.outcomes
    if report.event is DeviceEvent.HEALTH and report.health is not None:
        mine = (told.c.device_id == report.device_id) & (told.c.release == device["running"])
        update = told.update().where(mine & (told.c.event == DeviceEvent.COMMITTED.value))
        connection.execute(update.values(health_after=asdict(report.health)))
    if report.event not in OUTCOMES or not 0 < len(report.rollout) <= ROLLOUT_MAX:
        return
    key = {name: row[name] for name in ("rollout", "device_id", "release")}
    match = sa.and_(*(told.c[name] == value for name, value in key.items()))
    before = connection.execute(sa.select(told).where(match)).mappings().first()
    again = before is not None and before["event"] in FAILURES and report.event in FAILURES
    word = {name: row[name] for name in ("event", "reason", "received")} | {
        "detail": report.detail,
        "quality": asdict(report.quality) if report.quality else None,
        "payload_bytes": report.payload_bytes,
        "attempts": before["attempts"] + 1 if before is not None and again else 1,
        "health_before": before["health_before"] if before is not None else device["health"],
        "health_after": asdict(report.health) if report.health else None,
    }
    if before is None:
        connection.execute(told.insert().values(key | word))
    else:
        if word["quality"] is None:  # a later word of the same release doesn't unmeasure it
            word["quality"] = before["quality"]
        connection.execute(told.update().where(match).values(word))


def forget_old(connection: sa.Connection, device_id: str) -> None:
    """Keep the newest reports of a device, of health and of everything else.

    A fleet of thousands that tells of its health every five minutes would fill a disk in days, and
    so would one device that says the same thing over and over.

    Args:
        connection: in a transaction that writes.
        device_id: whose.
    """
    table = tables.reports
    health = table.c.event == DeviceEvent.HEALTH.value
    for which, kept in ((health, HEALTH_KEPT), (~health, OTHERS_KEPT)):
        mine = (table.c.device_id == device_id) & which
        newest = sa.select(table.c.sequence).where(mine).order_by(table.c.sequence.desc())
        beyond = newest.limit(1).offset(kept).scalar_subquery()
        connection.execute(table.delete().where(mine & (table.c.sequence <= beyond)))


def consequences(device: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Columns of the device's row that a report changes."""
    changes: dict[str, Any] = {}
    if report.event in (DeviceEvent.COMMITTED, DeviceEvent.STARTED):
        if report.release != device["running"]:
            changes |= {"running": report.release, "before": device["running"]}
    elif report.event is DeviceEvent.REVERTED and report.release == device["running"]:
        changes |= {"running": device["before"], "before": ""}
    if report.health is not None:
        changes["health"] = asdict(report.health)
    return changes
