"""Whose signatures count in a secure sum: the enrolled identities of a cohort, by name.

    >>> key = seeded_identity(7, "ann")
    >>> roster = Roster({"ann": public_bytes(key)})
    >>> roster.verify("ann", b"hello", signer(key)(b"hello"))
    True
    >>> roster.verify("bob", b"hello", signer(key)(b"hello"))
    False
    >>> Roster.from_bytes(roster.to_bytes()) == roster
    True

A member believes the roster that it was given, so what the sum protects against a lying server
hangs on who made it. Made and signed off by somebody whom the members trust, with its digest pinned
on the devices, it keeps the server from playing other members. If the server made it (it runs the
authority that enrols), the signatures protect against everybody in between, and against a server
that becomes hostile after the roster was pinned; not against one that enrolled devices of its own
invention from the start.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.randomness import derive, seeded_key
from privacy.secure_session import MAX_MEMBERS, SecureSumError

SCHEMA = 1
MOST_BYTES = 16 << 20
# Order of the group of P-256 (FIPS 186-5, SP 800-186 section 3.2.1.3).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_HASH = ec.ECDSA(hashes.SHA256())


class RosterError(SecureSumError):
    """A roster that is missing, damaged, another one than was pinned, or lacks a member."""


@dataclass(frozen=True)
class Roster:
    """The public keys of those who may take part.

    Attributes:
        members: EC P-256 public keys, as DER SubjectPublicKeyInfo, by the member's name.

    Raises:
        RosterError: if a key is not one.
    """

    members: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name, key in self.members.items():
            _public(name, key)

    @property
    def digest(self) -> str:
        """What is pinned on a device: ``sha256:`` and 64 hex digits, over the file."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def verify(self, member: str, message: bytes, signature: bytes) -> bool:
        """Whether a signature over a message is the named member's; never for a stranger."""
        if member not in self.members:
            return False
        try:
            _public(member, self.members[member]).verify(signature, message, _HASH)
        except InvalidSignature:
            return False
        return True

    def to_bytes(self) -> bytes:
        """The file, the same for the same members."""
        keys = {name: base64.b64encode(key).decode() for name, key in self.members.items()}
        document = {"schema": SCHEMA, "members": keys}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Roster:
        """The inverse of :meth:`to_bytes`.

        Raises:
            RosterError: if it is no such file.
        """
        try:
            document = json.loads(data)
            if document["schema"] != SCHEMA or len(document["members"]) > MAX_MEMBERS:
                raise ValueError("another schema, or too many members")
            keys = {
                str(name): base64.b64decode(key, validate=True)
                for name, key in document["members"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RosterError(f"not a roster of enrolled identities: {error!r}") from None
        return cls(keys)

    @classmethod
    def of_certificates(cls, certificates: Iterable[bytes], authority: bytes = b"") -> Roster:
        """A roster out of device certificates, each by its common name: the device's id.

        Args:
            certificates: PEM.
            authority: PEM of the authority that must have issued them; empty to take them as they
                are.

        Raises:
            RosterError: if one cannot be read, was issued by somebody else, has another kind of
                key, or two have the same name.
        """
        issuer = _certificate(authority) if authority else None
        members: dict[str, bytes] = {}
        for number, pem in enumerate(certificates, 1):
            found = _certificate(pem, number)
            names = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
            name = str(names[0].value) if len(names) == 1 else ""
            if not name or name in members:
                raise RosterError(f"certificate {number} has no name of its own: {name[:80]!r}")
            if issuer is not None:
                try:
                    found.verify_directly_issued_by(issuer)
                except (ValueError, TypeError, InvalidSignature):
                    raise RosterError(
                        f"the certificate of {name} was not issued by this authority; leave it out"
                    ) from None
            members[name] = found.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        return cls(members)

    @classmethod
    def read(cls, path: Path, digest: str = "") -> Roster:
        """A roster from its file.

        Args:
            path: of the file.
            digest: what was pinned; empty for nothing.

        Raises:
            RosterError: if it is missing, damaged, or not the one that was pinned.
        """
        try:
            with path.open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise RosterError(
                f"{path}: no roster of enrolled identities can be read there "
                f"({error.strerror or error}); put the cohort's roster there"
            ) from None
        found = "sha256:" + hashlib.sha256(data).hexdigest()
        if digest and not hmac.compare_digest(found, digest):
            raise RosterError(
                f"{path} is {found}, pinned was {digest[:80]}: somebody changed the roster, or it "
                "was renewed and the pin was not; ask whoever made it for its digest"
            )
        return cls.from_bytes(data)


def public_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half, as a roster holds it."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def signer(key: ec.EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
    """Signs as enrolled devices do: ECDSA P-256 with SHA-256, DER."""
    return lambda message: key.sign(message, _HASH)


def seeded_identity(seed: int, member: str) -> ec.EllipticCurvePrivateKey:
    """The identity of a simulated member. Whoever knows the seed knows it: for simulations only."""
    drawn = derive(seeded_key(seed), "secure sum identity", member)
    return ec.derive_private_key(1 + int.from_bytes(drawn, "big") % (_ORDER - 1), ec.SECP256R1())


def _certificate(pem: bytes, number: int = 0) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        which = f"certificate {number}" if number else "the authority's certificate"
        raise RosterError(f"{which} cannot be read: {error}") from None


def _public(name: str, der: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RosterError(f"the key of {name[:80]} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise RosterError(f"the key of {name[:80]} is not an EC P-256 key")
    return key
