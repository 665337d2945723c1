"""Enrolment: a one-time token and a certificate request become a device with a certificate.

A token is 256 random bits, shown once; the database keeps its SHA-256. Using it, making the device
and writing the audit line are one transaction, so that a token is used exactly once whatever is
killed when. A device that never got the answer may ask again with the same token AND the same key
until the token expires; a second key is refused.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from federation import store as tables
from federation.authority import Authority, AuthorityError, public_key_of, spki
from federation.errors import FederationError
from federation.store import Store
from protos.messages import EnrolReply, EnrolRequest

TOKEN_SECONDS = 24 * 3600.0
_DEVICE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z", re.ASCII)


class EnrolmentReason(StrEnum):
    """Why an enrolment was refused."""

    UNKNOWN = "unknown-token"
    USED = "used-token"
    EXPIRED = "expired-token"
    BAD_REQUEST = "bad-request"
    NAME_TAKEN = "name-taken"


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


class Enrolment:
    """Gives out tokens and takes them back.

    Args:
        store: the server's database.
        authority: issues the certificates.
        root: the root metadata that a device shall trust from now on.
    """

    def __init__(self, store: Store, authority: Authority, root: Callable[[], bytes]) -> None:
        self._store = store
        self._authority = authority
        self._root = root

    @property
    def authority_pem(self) -> bytes:
        """What a device needs to recognise this server."""
        return self._authority.pem

    def make_token(
        self,
        *,
        who: str,
        device_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        seconds: float = TOKEN_SECONDS,
    ) -> Token:
        """A token for one device.

        Args:
            who: the operator, for the audit log.
            device_id: the name that the device shall have; by default a random one.
            tags: of the device.
            seconds: how long the token can be used.

        Raises:
            EnrolmentError: the name is malformed or taken, or the time is not positive.
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
        now = self._store.clock()
        token = Token(secrets.token_urlsafe(32), now + seconds)
        with self._store.write() as connection:
            if device_id is not None:
                _check_name_free(connection, device_id)
            row = {
                "digest": _digest(token.secret),
                "device_id": device_id,
                "tags": dict(tags or {}),
                "created": now,
                "expires": token.expires,
            }
            connection.execute(tables.tokens.insert().values(row))
            self._store.log(connection, who, "token", device_id or "(any name)", "enrolment token")
        return token

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Use a token up.

        Raises:
            EnrolmentError: with its reason; nothing has changed.
            StorageError: it could not be made durable; nothing has changed.
        """
        try:
            public = spki(public_key_of(request.certificate_request))
        except AuthorityError as error:
            raise EnrolmentError(EnrolmentReason.BAD_REQUEST, str(error)) from error
        now = self._store.clock()
        with self._store.write() as connection:
            token = _find_token(connection, request.token, now)
            if token["used"] is not None:
                device = _find_device(connection, token["device_id"])
                if device is None or device["public_key"] != public or device["revoked"]:
                    raise EnrolmentError(
                        EnrolmentReason.USED,
                        "this token has enrolled a device before; ask for a new one",
                    )
                return self._reply(device["id"], device["certificate"])
            device_id = token["device_id"] or _new_name(connection)
            _check_name_free(connection, device_id)
            moment = datetime.fromtimestamp(now, UTC)
            issued = self._authority.issue(request.certificate_request, device_id, moment)
            row = {
                "id": device_id,
                "enrolled": now,
                "serial": issued.serial,
                "certificate": issued.pem,
                "public_key": issued.public_key,
                "tags": {**request.tags, **token["tags"]},
                "inventory": asdict(request.inventory),
                "last_seen": now,
            }
            connection.execute(tables.devices.insert().values(row))
            used = tables.tokens.update().where(tables.tokens.c.digest == token["digest"])
            connection.execute(used.values(used=now, device_id=device_id))
            self._store.log(connection, device_id, "enrol", device_id, f"serial {issued.serial}")
        return self._reply(device_id, issued.pem)

    def _reply(self, device_id: str, certificate: bytes) -> EnrolReply:
        return EnrolReply(
            device_id=device_id,
            certificate=certificate,
            authority=self._authority.pem,
            root=self._root(),
        )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _find_token(connection: sa.Connection, secret: str, now: float) -> Mapping[str, Any]:
    query = sa.select(tables.tokens).where(tables.tokens.c.digest == _digest(secret))
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


def _find_device(connection: sa.Connection, device_id: str) -> Mapping[str, Any] | None:
    query = sa.select(tables.devices).where(tables.devices.c.id == device_id)
    row = connection.execute(query).mappings().first()
    return dict(row) if row is not None else None


def _check_name_free(connection: sa.Connection, device_id: str) -> None:
    if _find_device(connection, device_id) is not None:
        raise EnrolmentError(
            EnrolmentReason.NAME_TAKEN, f"there is a device {device_id!r}: choose another name"
        )


def _new_name(connection: sa.Connection) -> str:
    while True:
        name = f"d-{secrets.token_hex(5)}"
        if _find_device(connection, name) is None:
            return name
