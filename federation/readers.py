"""Who can be given the content key of an encrypted release: enrolled devices, by certificate.

A device's encryption key stands in its certificate, signed by its own identity key
(:mod:`protos.recipients`); there is no other list. A device without one was enrolled by an older
agent: it brings one with its next certificate.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from federation import tables
from federation.authority import requested_encryption_key
from federation.errors import FederationError
from federation.store import Store
from protos.recipients import RecipientError, encryption_key

log = logging.getLogger("airpeft.federation.readers")


class ReaderError(FederationError):
    """A device that a content key cannot be wrapped to; says which and why."""


@dataclass(frozen=True)
class Readers:
    """Devices by name, and what can be wrapped to them.

    Attributes:
        keys: public encryption keys, 32 bytes each, by device.
        lacking: devices that have none yet.
    """

    keys: Mapping[str, bytes]
    lacking: tuple[str, ...] = ()


def read_readers(
    certificates: Mapping[str, bytes], pinned: Mapping[str, bytes] | None = None
) -> Readers:
    """Readers out of certificates, each checked against the identity that it is for.

    Args:
        certificates: PEM, by device.
        pinned: the identity keys (SubjectPublicKeyInfo, DER) of the only devices that are meant,
            by name, from a roster that somebody has looked at; None takes the list as it is.

    Raises:
        ReaderError: a certificate does not parse, its encryption key is not signed by its
            identity, or a pinned device comes with another identity.
    """
    keys: dict[str, bytes] = {}
    lacking = []
    for device, pem in sorted(certificates.items()):
        if pinned is not None and device not in pinned:
            continue
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            found = encryption_key(certificate)
        except (ValueError, RecipientError) as error:
            raise ReaderError(f"the certificate of {device} cannot be used: {error}") from None
        if pinned is not None and identity_of(certificate) != pinned[device]:
            raise ReaderError(
                f"{device} is listed with another identity than the roster has: somebody enrolled "
                "it anew, or the server is not to be trusted; make the roster again if it was you"
            )
        if found is None:
            lacking.append(device)
        else:
            keys[device] = found
    return Readers(keys, tuple(lacking))


def identity_of(certificate: x509.Certificate) -> bytes:
    """A certificate's public key as SubjectPublicKeyInfo, DER."""
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def active_certificates(store: Store, only: Collection[str] | None = None) -> dict[str, bytes]:
    """The newest certificate (PEM) of every device that is not revoked, by device.

    Args:
        store: the server's database.
        only: of these devices; None: of all.
    """
    table = tables.devices
    query = sa.select(table.c.id, table.c.certificate).where(table.c.revoked.is_(None))
    with store.read() as connection:
        rows = [(row.id, row.certificate) for row in connection.execute(query)]
    return {device: pem for device, pem in rows if only is None or device in only}


def barred_keys(store: Store) -> frozenset[bytes]:
    """Encryption keys of revoked devices: no content key is wrapped to them any more."""
    table = tables.devices
    query = sa.select(table.c.certificate).where(table.c.revoked.is_not(None))
    with store.read() as connection:
        found = connection.execute(query).scalars().all()
    return frozenset(_known_keys(found))


def brings_first_key(certificate: bytes, request: bytes) -> bool:
    """Whether a request (PEM) brings an encryption key to a certificate (PEM) without one."""
    if requested_encryption_key(request) is None:
        return False
    return encryption_key(x509.load_pem_x509_certificate(certificate)) is None


def _known_keys(certificates: Iterable[bytes]) -> Iterable[bytes]:
    for pem in certificates:
        found = encryption_key(x509.load_pem_x509_certificate(pem))
        if found is not None:
            yield found
