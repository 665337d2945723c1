"""To whom content keys are wrapped: a device's encryption key, bound to its identity.

A device makes an X25519 key beside its identity key. What crosses the wire is the public half with
a signature by the identity key over it, in an extension of the certificate request; the fleet's
authority copies it into the certificate. So whoever has a device's certificate knows where to wrap
to, and needs to trust nobody but that identity for it: an authority that is in wrong hands can
invent devices, and cannot put another encryption key under an identity that is known.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protos.errors import WireError

PUBLIC = 32  # bytes of an X25519 public key (RFC 7748)
MAX_EXTENSION = 2 + PUBLIC + 80
# 2.25: the arc of UUIDs (ITU-T X.667), which needs no registration.
EXTENSION = x509.ObjectIdentifier("2.25.125069466484658667900998163083154001639")
_SIGNED = b"airpeft.v1 encryption key\0"
_HASH = ec.ECDSA(hashes.SHA256())


class RecipientError(WireError):
    """An encryption key that is malformed, or not signed by the identity that it comes with."""


def extension(identity: ec.EllipticCurvePrivateKey, public: bytes) -> x509.UnrecognizedExtension:
    """What a device adds to its certificate request.

    Args:
        identity: its private identity key, EC P-256.
        public: its public encryption key, 32 bytes.
    """
    body = public + identity.sign(_SIGNED + public, _HASH)
    return x509.UnrecognizedExtension(EXTENSION, b"\x04" + bytes([len(body)]) + body)


def found_extension(
    document: x509.Certificate | x509.CertificateSigningRequest,
) -> x509.UnrecognizedExtension | None:
    """The extension of a certificate or a request, as it stands there; None without one.

    Raises:
        RecipientError: its extensions cannot be read.
    """
    try:
        value = document.extensions.get_extension_for_oid(EXTENSION).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension) as error:
        raise RecipientError(f"extensions that cannot be read: {error}") from None
    assert isinstance(value, x509.UnrecognizedExtension)  # noqa: S101  # no library knows it
    return value


def encryption_key(
    document: x509.Certificate | x509.CertificateSigningRequest,
) -> bytes | None:
    """The encryption key in a certificate or a request: 32 bytes, or None where there is none.

    Raises:
        RecipientError: it is malformed, or the document's own key has not signed it.
    """
    found = found_extension(document)
    if found is None:
        return None
    value, identity = found.value, document.public_key()
    head, public, signature = value[:2], value[2 : 2 + PUBLIC], value[2 + PUBLIC :]
    if len(value) > MAX_EXTENSION or head != b"\x04" + bytes([max(0, len(value) - 2) % 256]):
        raise RecipientError(f"the encryption key is malformed ({len(value)} bytes)")
    if not isinstance(identity, ec.EllipticCurvePublicKey):
        raise RecipientError("the encryption key belongs to an identity that is not EC")
    try:
        identity.verify(signature, _SIGNED + public, _HASH)
    except InvalidSignature:
        raise RecipientError("the encryption key is not signed by the identity") from None
    return public


def public_half(pem: bytes) -> bytes:
    """The public half of an unencrypted X25519 private key in PEM, 32 bytes.

    Raises:
        RecipientError: it is none.
    """
    return private_key(pem).public_key().public_bytes_raw()


def private_key(pem: bytes) -> X25519PrivateKey:
    """An unencrypted X25519 private key in PEM (PKCS#8).

    Raises:
        RecipientError: it is none.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise RecipientError(f"not a private key: {error}") from None
    if not isinstance(key, X25519PrivateKey):
        raise RecipientError("the encryption key is not an X25519 key")
    return key
