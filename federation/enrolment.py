"""Enrolment: a one-time token and a certificate request become a device with a certificate.

A token is 256 random bits, shown once; the database keeps its SHA-256. Using it, making the device
and writing the audit line are one transaction, so that a token is used exactly once whatever is
killed when. A device that never got the answer may ask again with the same token AND the same key
until the token expires; a second key is refused.

A request without a token proves the key alone, for the key itself has signed it. It is answered
for a key that an operator has authorised beforehand, and for the key of an enrolled device: that is
how a device renews its short-lived certificate, before or after its end. Whoever replays such a
request gets a certificate that is of no use without the key; asked again early, the answer is the
certificate of last time, unless the device brings its first encryption key. What a revoked device
asks for is refused.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from federation import tables
from federation.authority import (
    DEVICE_LIFE,
    Authority,
    AuthorityError,
    DeviceCertificate,
    public_key_of,
    read_public_key,
    requested_encryption_key,
    spki,
)
from federation.permits import (
    EnrolmentError,
    EnrolmentReason,
    Token,
    check_name_free,
    check_wish,
    digest_of,
    find_device,
    find_token,
    holder_of,
    new_name,
)
from federation.readers import brings_first_key
from federation.store import Store
from protos.messages import EnrolReply, EnrolRequest

__all__ = ["Enrolment", "EnrolmentError", "EnrolmentReason", "Token"]

TOKEN_SECONDS = 24 * 3600.0
AUTHORISED_SECONDS = 90 * 86400.0
LAPSE_SECONDS = 180 * 86400.0  # after its end a certificate can be renewed for so long


class Enrolment:
    """Gives out tokens and takes them back.

    Args:
        store: the server's database.
        authority: issues the certificates.
        root: the root metadata that a device shall trust from now on.
        life: of a device certificate.
    """

    def __init__(
        self,
        store: Store,
        authority: Authority,
        root: Callable[[], bytes],
        *,
        life: timedelta = DEVICE_LIFE,
    ) -> None:
        self._store = store
        self._life = life
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
        check_wish(device_id, seconds)
        now = self._store.clock()
        token = Token(secrets.token_urlsafe(32), now + seconds)
        with self._store.write() as connection:
            if device_id is not None:
                check_name_free(connection, device_id)
            row = {
                "digest": digest_of(token.secret),
                "device_id": device_id,
                "tags": dict(tags or {}),
                "created": now,
                "expires": token.expires,
            }
            connection.execute(tables.tokens.insert().values(row))
            self._store.log(connection, who, "token", device_id or "(any name)", "enrolment token")
        return token

    def authorise_key(
        self,
        public_key: bytes,
        *,
        who: str,
        device_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        seconds: float = AUTHORISED_SECONDS,
    ) -> float:
        """Let the device with this key enrol without a token; when that ends, Unix seconds.

        Args:
            public_key: PEM, EC P-256; the device has the private half.
            who: the operator, for the audit log.
            device_id: the name that the device shall have; by default a random one.
            tags: of the device.
            seconds: how long it may be used.

        Raises:
            EnrolmentError: no such key or name, or a device has one of them already.
        """
        check_wish(device_id, seconds)
        try:
            public = read_public_key(public_key)
        except AuthorityError as error:
            raise EnrolmentError(EnrolmentReason.BAD_REQUEST, str(error)) from error
        now, table = self._store.clock(), tables.authorised_keys
        digest = hashlib.sha256(public).hexdigest()
        with self._store.write() as connection:
            holder = holder_of(connection, public)
            if holder is not None:
                raise EnrolmentError(
                    EnrolmentReason.KEY_TAKEN, f"device {holder['id']} has this key"
                )
            if device_id is not None:
                check_name_free(connection, device_id)
            row = {
                "digest": digest,
                "device_id": device_id,
                "tags": dict(tags or {}),
                "created": now,
                "expires": now + seconds,
            }
            connection.execute(table.delete().where(table.c.digest == digest))
            connection.execute(table.insert().values(row))
            why = f"key {digest[:16]}"
            self._store.log(connection, who, "authorise", device_id or "(any name)", why)
        return now + seconds

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Use a token up; without a token, by the key alone: see the module's text.

        Raises:
            EnrolmentError: with its reason; nothing has changed.
            StorageError: it could not be made durable; nothing has changed.
        """
        try:
            public = spki(public_key_of(request.certificate_request))
            requested_encryption_key(request.certificate_request)
        except AuthorityError as error:
            raise EnrolmentError(EnrolmentReason.BAD_REQUEST, str(error)) from error
        now = self._store.clock()
        with self._store.write() as connection:
            holder = holder_of(connection, public)
            if holder is not None and holder["revoked"] is not None:
                raise EnrolmentError(
                    EnrolmentReason.REVOKED,
                    f"device {holder['id']} was revoked: enrol it anew, with another key",
                )
            if not request.token:
                if holder is not None:
                    return self._renew(connection, holder, request, now)
                return self._enrol_authorised(connection, request, public, now)
            token = find_token(connection, request.token, now)
            if token["used"] is not None:
                device = find_device(connection, token["device_id"])
                if device is None or device["public_key"] != public or device["revoked"]:
                    raise EnrolmentError(
                        EnrolmentReason.USED,
                        "this token has enrolled a device before; ask for a new one",
                    )
                return self._reply(device["id"], device["certificate"])
            if holder is not None:
                raise EnrolmentError(
                    EnrolmentReason.KEY_TAKEN,
                    f"device {holder['id']} has this key: it renews without a token; a second"
                    " device makes a key of its own",
                )
            reply = self._admit(connection, request, token, now)
            used = tables.tokens.update().where(tables.tokens.c.digest == token["digest"])
            connection.execute(used.values(used=now, device_id=reply.device_id))
        return reply

    def _admit(
        self,
        connection: sa.Connection,
        request: EnrolRequest,
        permit: Mapping[str, Any],
        now: float,
    ) -> EnrolReply:
        """Make the device that a token or an authorised key stands for."""
        device_id = permit["device_id"] or new_name(connection)
        check_name_free(connection, device_id)
        issued = self._issue(connection, request, device_id, now)
        row = {
            "id": device_id,
            "enrolled": now,
            "serial": issued.serial,
            "certificate": issued.pem,
            "public_key": issued.public_key,
            "tags": {**request.tags, **permit["tags"]},
            "inventory": asdict(request.inventory),
            "last_seen": now,
        }
        connection.execute(tables.devices.insert().values(row))
        self._store.log(connection, device_id, "enrol", device_id, f"serial {issued.serial}")
        return self._reply(device_id, issued.pem)

    def _enrol_authorised(
        self, connection: sa.Connection, request: EnrolRequest, public: bytes, now: float
    ) -> EnrolReply:
        table, digest = tables.authorised_keys, hashlib.sha256(public).hexdigest()
        found = connection.execute(sa.select(table).where(table.c.digest == digest))
        permit = found.mappings().first()
        if permit is None or permit["used"] is not None or now > permit["expires"]:
            raise EnrolmentError(
                EnrolmentReason.UNKNOWN_KEY,
                "no device has this key, and it is not authorised (any more): give a token, or"
                " airpeft fleet authorise",
            )
        reply = self._admit(connection, request, dict(permit), now)
        connection.execute(table.update().where(table.c.digest == digest).values(used=now))
        return reply

    def _renew(
        self,
        connection: sa.Connection,
        device: Mapping[str, Any],
        request: EnrolRequest,
        now: float,
    ) -> EnrolReply:
        """The next certificate; the one of last time, while most of its life is left."""
        held, device_id = tables.certificates, device["id"]
        found = connection.execute(sa.select(held).where(held.c.serial == device["serial"]))
        last = found.mappings().one()
        half = (last["expires"] - last["issued"]) / 2
        fresh = last["revoked"] is None and now < last["expires"] - half
        if fresh and not brings_first_key(device["certificate"], request.certificate_request):
            return self._reply(device_id, device["certificate"])
        if now > last["expires"] + LAPSE_SECONDS:
            raise EnrolmentError(
                EnrolmentReason.LAPSED,
                f"the certificate of {device_id} ended more than"
                f" {LAPSE_SECONDS / 86400:g} days ago: revoke the device and enrol it anew",
            )
        issued = self._issue(connection, request, device_id, now)
        change = tables.devices.update().where(tables.devices.c.id == device_id)
        connection.execute(change.values(serial=issued.serial, certificate=issued.pem))
        self._store.log(connection, device_id, "renew", device_id, f"serial {issued.serial}")
        return self._reply(device_id, issued.pem)

    def _issue(
        self, connection: sa.Connection, request: EnrolRequest, device_id: str, now: float
    ) -> DeviceCertificate:
        moment = datetime.fromtimestamp(now, UTC)
        issued = self._authority.issue(request.certificate_request, device_id, moment, self._life)
        row = {
            "serial": issued.serial,
            "device_id": device_id,
            "issued": now,
            "expires": issued.expires,
        }
        connection.execute(tables.certificates.insert().values(row))
        self._store.announce(connection, "enrolled", device_id)
        return issued

    def _reply(self, device_id: str, certificate: bytes) -> EnrolReply:
        return EnrolReply(
            device_id=device_id,
            certificate=certificate,
            authority=self._authority.pem,
            root=self._root(),
        )
