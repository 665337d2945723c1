"""What allows a device to enrol: one-time tokens, names that are free; and why not."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.errors import FederationError

_DEVICE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z", re.ASCII)


class EnrolmentReason(StrEnum):
    """Why an enrolment was refused."""

    UNKNOWN = "unknown-token"
    USED = "used-token"
    EXPIRED = "expired-token"
    BAD_REQUEST = "bad-request"
    NAME_TAKEN = "name-taken"
    KEY_TAKEN = "key-taken"
    UNKNOWN_KEY = "unknown-key"
    REVOKED = "revoked-device"
    LAPSED = "lapsed-certificate"


class EnrolmentError(FederationError):
    """A token or a certificate request that is refused."""

    def __init__(self, reason: EnrolmentReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Token:
    """A fresh token; the only time that its secret is seen."""

    secret: str
    expires: float  # Unix seconds

    def __repr__(self) -> str:  # the secret must not end up in a log
        return f"Token(expires={self.expires})"


def digest_of(secret: str) -> str:
    """SHA-256 of a token's secret, hex: all that the database keeps of it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def find_token(connection: sa.Connection, secret: str, now: float) -> Mapping[str, Any]:
    """The token with this secret.

    Raises:
        EnrolmentError: there is none, or it has expired.
    """
    query = sa.select(tables.tokens).where(tables.tokens.c.digest == digest_of(secret))
    row = connection.execute(query).mappings().first()
    if row is None:
        raise EnrolmentError(
            EnrolmentReason.UNKNOWN, "no such token; make one: airpeft fleet token"
        )
    if now > row["expires"]:
        raise EnrolmentError(
            EnrolmentReason.EXPIRED, "the token has expired; make one: airpeft fleet token"
        )
    return dict(row)


def find_device(connection: sa.Connection, device_id: str) -> Mapping[str, Any] | None:
    """One device's row, if there is such a device."""
    query = sa.select(tables.devices).where(tables.devices.c.id == device_id)
    row = connection.execute(query).mappings().first()
    return dict(row) if row is not None else None


def holder_of(connection: sa.Connection, public: bytes) -> Mapping[str, Any] | None:
    """The device with this key, if any; a revoked one too."""
    query = sa.select(tables.devices).where(tables.devices.c.public_key == public)
    row = connection.execute(query).mappings().first()
    return dict(row) if row is not None else None


def check_wish(device_id: str | None, seconds: float) -> None:
    """Refuse a malformed name, or a lifetime out of bounds.

    Raises:
        EnrolmentError: it is one of these.
    """
    if device_id is not None and not _DEVICE_ID.match(device_id):
        raise EnrolmentError(
            EnrolmentReason.BAD_REQUEST,
            f"device name {device_id!r}: 1 to 63 lower-case letters, digits and hyphens",
        )
    if not 0 < seconds <= 365 * 86400:
        raise EnrolmentError(
            EnrolmentReason.BAD_REQUEST, f"lifetime {seconds!r} s: above 0, up to a year"
        )


def check_name_free(connection: sa.Connection, device_id: str) -> None:
    """Refuse a name that a device has already.

    Raises:
        EnrolmentError: it has.
    """
    if find_device(connection, device_id) is not None:
        raise EnrolmentError(
            EnrolmentReason.NAME_TAKEN, f"there is a device {device_id!r}: choose another name"
        )


def new_name(connection: sa.Connection) -> str:
    """A random name that no device has."""
    while True:
        name = f"d-{secrets.token_hex(5)}"
        if find_device(connection, name) is None:
            return name
