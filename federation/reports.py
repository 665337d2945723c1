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
from sqlalchemy.dialects import sqlite

from federation import store as tables
from federation.errors import FederationError
from federation.orders import FAILURES
from protos.errors import WireError
from protos.messages import DeviceEvent, Report, SignedReport, decode_report

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
    connection: sa.Connection, report: Report, signed: SignedReport, now: float
) -> None:
    """Store a report, and the device's last word on a rollout's release if it is one."""
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
    if report.event not in OUTCOMES or not report.rollout:
        return
    key = {name: row[name] for name in ("rollout", "device_id", "release")}
    word = {name: row[name] for name in ("event", "reason", "received")} | {
        "detail": report.detail,
        "quality": asdict(report.quality) if report.quality else None,
        "payload_bytes": report.payload_bytes,
    }
    insert = sqlite.insert(tables.outcomes).values(key | word)
    connection.execute(insert.on_conflict_do_update(index_elements=list(key), set_=word))


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
