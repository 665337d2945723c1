"""Who the device is: its private key, its certificate, and the two roots that it trusts.

The key is made on the device and never leaves it; a certificate request carries the public half
(PKCS#10, EC P-256). Folder, all files written durably::

    identity/key.pem          private key, PKCS#8, mode 0600; made before the first enrolment
    identity/encryption.pem   private X25519 key, likewise: content keys are wrapped to it
    identity/certificate.pem  from the fleet's authority; its common name is the device id
    identity/authority.pem    the fleet's certificate authority
    identity/root.json        trusted TUF root metadata, the start of every metadata check
    identity/identity.json    device id and server addresses; written last: its presence says
                              that the enrolment is complete

A kill during an enrolment leaves no ``identity.json``; enrolling again uses the same key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID

from aggregation.durable import write_bytes
from clients.errors import ClientError
from protos.messages import EnrolReply
from protos.recipients import RecipientError, encryption_key, extension, public_half

FOLDER, ENCRYPTION = "identity", "encryption.pem"


class IdentityError(ClientError):
    """The device is not enrolled, or its identity on disk cannot be used."""


@dataclass(frozen=True)
class Identity:
    """An enrolled device.

    Attributes:
        device_id: name given by the fleet; the certificate's common name.
        fleet: ``host:port`` of the fleet service.
        key_pem: private key, PKCS#8.
        certificate_pem: the device certificate, with its chain if there is one.
        authority_pem: what server certificates are checked against.
        root: trusted TUF root metadata.
        enrol: ``host:port`` of the enrolment service, where the certificate is renewed; empty for
            a device that was enrolled before there was renewal.
        encryption_pem: private encryption key, PKCS#8; empty where none was made yet.
    """

    device_id: str
    fleet: str
    key_pem: bytes
    certificate_pem: bytes
    authority_pem: bytes
    root: bytes
    enrol: str = ""
    encryption_pem: bytes = b""

    def __repr__(self) -> str:  # the key must not end up in a log
        return f"Identity(device_id={self.device_id!r}, fleet={self.fleet!r})"

    @property
    def life(self) -> tuple[datetime, datetime]:
        """From when to when the certificate holds."""
        certificate = x509.load_pem_x509_certificate(self.certificate_pem)
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc

    @property
    def is_reader(self) -> bool:
        """Whether the certificate names this device's encryption key: then one can wrap to it."""
        if not self.encryption_pem:
            return False
        certificate = x509.load_pem_x509_certificate(self.certificate_pem)
        try:
            return encryption_key(certificate) == public_half(self.encryption_pem)
        except RecipientError:
            return False

    def sign(self, body: bytes) -> bytes:
        """ECDSA P-256 with SHA-256 over ``body``, DER: how reports are signed."""
        return _private_key(self.key_pem, "key.pem").sign(body, ec.ECDSA(hashes.SHA256()))


def key_of(home: Path) -> bytes:
    """The device's private key (PEM), made durably at the first call.

    Raises:
        IdentityError: the file there is not an EC P-256 key.
        StorageError: the key could not be written.
    """
    path = home / FOLDER / "key.pem"
    if not path.exists():
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        write_bytes(path, pem, mode=0o600)
    pem = path.read_bytes()
    _private_key(pem, str(path))
    return pem


def encryption_key_of(home: Path) -> bytes:
    """The device's private encryption key (X25519, PEM), made durably at the first call.

    Raises:
        IdentityError: the file there is not such a key.
        StorageError: the key could not be written.
    """
    path = home / FOLDER / ENCRYPTION
    if not path.exists():
        pem = X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_bytes(path, pem, mode=0o600)
    pem = path.read_bytes()
    try:
        public_half(pem)
    except RecipientError as error:
        raise IdentityError(
            f"{path}: {error}: remove it, and the next certificate brings a new one"
        ) from None
    return pem


def certificate_request(
    key_pem: bytes, *, name: str = "device", encryption_pem: bytes = b""
) -> bytes:
    """A PKCS#10 request (PEM) for the key, which signs the encryption key in it if there is one.

    Args:
        key_pem: the device's private key.
        name: a hint; the authority chooses the name.
        encryption_pem: private encryption key; empty: none.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    key = _private_key(key_pem, "key.pem")
    if encryption_pem:
        request = request.add_extension(extension(key, public_half(encryption_pem)), critical=False)
    signed = request.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def save(home: Path, reply: EnrolReply, *, key_pem: bytes, fleet: str, enrol: str = "") -> Identity:
    """Keep what the enrolment gave, after checking that it belongs to this device's key.

    Raises:
        IdentityError: the certificate is for another key, or carries another name.
        StorageError: it could not be written; the device is then not enrolled.
    """
    _check_certificate(reply.certificate, key_pem, reply.device_id)
    folder = home / FOLDER
    write_bytes(folder / "certificate.pem", reply.certificate)
    write_bytes(folder / "authority.pem", reply.authority)
    write_bytes(folder / "root.json", reply.root)
    document = {"schema": 1, "device_id": reply.device_id, "fleet": fleet, "enrol": enrol}
    write_bytes(folder / "identity.json", json.dumps(document, sort_keys=True).encode())
    return load(home)


def renewed(home: Path, who: Identity, certificate: bytes) -> Identity:
    """Keep the next certificate, after checking that it is this device's and the authority's.

    Raises:
        IdentityError: it is not, or holds no longer than the one before.
        StorageError: it could not be written; the one before is still there.
    """
    _check_certificate(certificate, who.key_pem, who.device_id)
    try:
        issuer = x509.load_pem_x509_certificate(who.authority_pem)
        x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(f"the new certificate is not of this fleet: {error!r}") from None
    after = replace(who, certificate_pem=certificate)
    if after.life[1] <= who.life[1] and after.is_reader <= who.is_reader:
        raise IdentityError(f"the new certificate ends at {after.life[1]}, as the old one does")
    write_bytes(home / FOLDER / "certificate.pem", certificate)
    return after


def public_key_of(key_pem: bytes) -> bytes:
    """The public half (PEM), for an operator who authorises it."""
    return (
        _private_key(key_pem, "key.pem")
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def load(home: Path) -> Identity:
    """The identity of an enrolled device.

    Raises:
        IdentityError: not enrolled, or a file is damaged.
    """
    folder = home / FOLDER
    try:
        document = json.loads((folder / "identity.json").read_bytes())
        identity = Identity(
            device_id=str(document["device_id"]),
            fleet=str(document["fleet"]),
            key_pem=(folder / "key.pem").read_bytes(),
            certificate_pem=(folder / "certificate.pem").read_bytes(),
            authority_pem=(folder / "authority.pem").read_bytes(),
            root=(folder / "root.json").read_bytes(),
            enrol=str(document.get("enrol", "")),
            encryption_pem=_optional(folder / ENCRYPTION),
        )
    except FileNotFoundError as error:
        raise IdentityError(
            f"{home} is not an enrolled device ({Path(str(error.filename)).name} is missing): "
            "run 'airpeft device enrol ENROL.json --home DIR' with a fresh token"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise IdentityError(
            f"{folder / 'identity.json'} is damaged ({error!r}): enrol the device again"
        ) from None
    _check_certificate(identity.certificate_pem, identity.key_pem, identity.device_id)
    return identity


def _optional(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _private_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"{where} is not a private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise IdentityError(f"{where} is not an EC P-256 key: remove it and enrol again")
    return key


def _check_certificate(pem: bytes, key_pem: bytes, device_id: str) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IdentityError(f"the device certificate cannot be read: {error}") from None
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ours = _private_key(key_pem, "key.pem").public_key().public_bytes(*spki)
    if certificate.public_key().public_bytes(*spki) != ours:
        raise IdentityError("the device certificate is for another key: enrol the device again")
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [name.value for name in names] != [device_id]:
        raise IdentityError(
            f"the device certificate names {[n.value for n in names]}, not {device_id!r}"
        )
