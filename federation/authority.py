"""The fleet's certificate authority: who may speak to the server, and who the server is.

One EC P-256 authority, made at the first start. It issues one certificate to the server (server
authentication only) and one to each enrolled device (client authentication only, common name = the
device's name), so that no device can pose as the server. Folder, keys with mode 0600::

    authority/ca.key  authority/ca.pem  authority/server.key  authority/server.pem

It knows nothing of tokens, of the database or of gRPC.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregation import durable
from federation.errors import FederationError
from protos.channel import SERVER_NAME, ServerTls
from protos.recipients import RecipientError, encryption_key, found_extension

AUTHORITY_LIFE = timedelta(days=3650)
SERVER_LIFE = timedelta(days=365)
SERVER_RENEW = timedelta(days=60)  # a start with less than this left makes a new one
DEVICE_LIFE = timedelta(days=30)  # devices renew by themselves long before
BACKDATE = timedelta(minutes=10)  # for devices whose clock is a little behind

_PEM = serialization.Encoding.PEM


class AuthorityError(FederationError):
    """A certificate request that is refused, or an authority folder that cannot be used."""


@dataclass(frozen=True)
class DeviceCertificate:
    """What a device gets, and what the server keeps of it."""

    pem: bytes
    serial: str  # hex
    expires: float  # Unix seconds
    public_key: bytes  # SubjectPublicKeyInfo, DER


@dataclass(frozen=True)
class Authority:
    """The authority of one fleet."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def __repr__(self) -> str:  # the key must not end up in a log
        return f"Authority({self.certificate.serial_number:x})"

    @property
    def pem(self) -> bytes:
        """The public certificate."""
        return self.certificate.public_bytes(_PEM)

    def issue(
        self, request: bytes, device_id: str, now: datetime, life: timedelta = DEVICE_LIFE
    ) -> DeviceCertificate:
        """A certificate for the key in a PKCS#10 request, under a name of our choice.

        Nothing but the keys is taken from the request: no name, and of the extensions only the
        encryption key, which the request's key has signed (:mod:`protos.recipients`).

        Args:
            request: PEM.
            device_id: the common name.
            now: with a zone.
            life: how long it holds.

        Raises:
            AuthorityError: not a request, a wrong signature, or not an EC P-256 key; or an
                encryption key that it has not signed.
        """
        public = public_key_of(request)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = self._sign(
            device_id, public, now, life, [], usage, _encryption_extension(request)
        )
        return DeviceCertificate(
            pem=certificate.public_bytes(_PEM),
            serial=f"{certificate.serial_number:x}",
            expires=certificate.not_valid_after_utc.timestamp(),
            public_key=spki(public),
        )

    def _sign(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        now: datetime,
        life: timedelta,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        further: x509.UnrecognizedExtension | None = None,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if further is not None:
            builder = builder.add_extension(further, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def open_authority(folder: Path, now: datetime) -> Authority:
    """The authority in a folder; made there at the first call.

    Raises:
        AuthorityError: a file is damaged or half of the pair is missing.
        StorageError: the folder cannot be written.
    """
    key_path, certificate_path = folder / "ca.key", folder / "ca.pem"
    if not certificate_path.exists():
        # The certificate goes last: a kill in between leaves a key without one, used next time.
        key = _load_key(key_path) if key_path.exists() else _new_key(key_path)
        durable.write_bytes(certificate_path, _self_signed(key, now).public_bytes(_PEM))
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    except (OSError, ValueError) as error:
        raise AuthorityError(f"cannot read {certificate_path}: {error}") from error
    authority = Authority(_load_key(key_path), certificate)
    if spki(authority.key.public_key()) != certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    ):
        raise AuthorityError(f"{key_path} does not belong to {certificate_path}")
    return authority


def server_tls(
    authority: Authority, folder: Path, now: datetime, *, clients: bool, hosts: tuple[str, ...] = ()
) -> ServerTls:
    """The server's key and certificate, renewed when it is near its end.

    Args:
        authority: issues it.
        folder: keeps it.
        now: with a zone.
        clients: whether a client must show a device certificate.
        hosts: additional names and addresses for other programs; devices ask for the fleet's own
            name whatever address they dial.

    Raises:
        AuthorityError: a file is damaged.
        StorageError: the folder cannot be written.
    """
    key_path, certificate_path = folder / "server.key", folder / "server.pem"
    key = _load_key(key_path) if key_path.exists() else _new_key(key_path)
    fresh = False
    if certificate_path.exists():
        held = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        fresh = held.not_valid_after_utc - now > SERVER_RENEW and now >= held.not_valid_before_utc
    if not fresh:
        names = [_general_name(name) for name in (SERVER_NAME, "localhost", "127.0.0.1", *hosts)]
        certificate = authority._sign(
            SERVER_NAME, key.public_key(), now, SERVER_LIFE, names, ExtendedKeyUsageOID.SERVER_AUTH
        )
        durable.write_bytes(certificate_path, certificate.public_bytes(_PEM))
    return ServerTls(
        key=key_path.read_bytes(),
        certificate=certificate_path.read_bytes(),
        client_authority=authority.pem if clients else None,
    )


def public_key_of(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key in a PKCS#10 request (PEM), whose owner has signed it.

    Raises:
        AuthorityError: as for :meth:`Authority.issue`.
    """
    try:
        parsed = x509.load_pem_x509_csr(request)
        valid = parsed.is_signature_valid
        public = parsed.public_key()
    except Exception as error:
        # The parser raises several kinds (ValueError, UnsupportedAlgorithm, TypeError); whatever
        # it says, the request is refused.
        raise AuthorityError(f"certificate request: not PKCS#10 in PEM: {error}") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise AuthorityError("certificate request: the key must be EC P-256")
    if not valid:
        raise AuthorityError("certificate request: its signature is wrong")
    return public


def requested_encryption_key(request: bytes) -> bytes | None:
    """The encryption key that a request brings: 32 bytes, or None.

    Raises:
        AuthorityError: it is malformed, or the request's key has not signed it.
    """
    try:
        return encryption_key(x509.load_pem_x509_csr(request))
    except RecipientError as error:
        raise AuthorityError(f"certificate request: {error}") from None


def _encryption_extension(request: bytes) -> x509.UnrecognizedExtension | None:
    if requested_encryption_key(request) is None:
        return None
    return found_extension(x509.load_pem_x509_csr(request))


def read_public_key(pem: bytes) -> bytes:
    """A public key in PEM as SubjectPublicKeyInfo, DER.

    Raises:
        AuthorityError: it is none, or not EC P-256.
    """
    try:
        public = serialization.load_pem_public_key(pem)
    except Exception as error:
        # Several kinds, as in public_key_of; whatever it says, the key is refused.
        raise AuthorityError(f"public key: not one in PEM: {error}") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise AuthorityError("public key: it must be EC P-256")
    return spki(public)


def spki(public: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as SubjectPublicKeyInfo, DER."""
    return public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = _name("AirPEFT fleet authority")
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    durable.write_bytes(path, pem, mode=0o600)
    return key


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityError(f"cannot read the key {path}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{path} is not an EC key")
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
