"""An OpenSSF model-signing bundle beside a release: its digest is signed, its content looked at.

The bundle (OpenSSF Model Signing 1.0: a Sigstore bundle whose DSSE envelope holds an in-toto
statement) says who trained or built the files of a model folder. It is provenance, not freshness:
devices do not read it. What is checked here is that it is such a bundle, that its own digests agree
with each other and that every file that it names lies in the adapter's folder as it says, so that
nobody attaches the wrong one. A bundle that was signed with a plain key is verified, too, where the
public key is given; one of a Sigstore identity or a certificate is for ``model_signing verify``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aggregation.peft_layout import TENSORS
from federation.errors import FederationError

MAX_BUNDLE, MAX_KEY = 4 << 20, 64 << 10
HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE = "https://model_signing/"


class BundleError(FederationError):
    """A file that is no model-signing bundle, or one for other files; says which field."""


def bundle_digest(path: Path, adapter_folder: Path, public_key: Path | None = None) -> str:
    """``sha256:<hex>`` of a bundle that speaks of the files of an adapter.

    Args:
        path: the bundle, as ``model_signing sign`` wrote it.
        adapter_folder: the folder that was signed.
        public_key: PEM file of an elliptic-curve key that must have signed it; None: not verified.

    Raises:
        BundleError: it can't be read, is no such bundle, names other files or the same ones with
            other bytes, or isn't signed by the key.
    """
    data = _read(path, MAX_BUNDLE)
    if len(data) > MAX_BUNDLE:
        raise BundleError(f"{path} has more than {MAX_BUNDLE} bytes")
    if public_key is not None:
        verify(data, _read(public_key, MAX_KEY), str(path))
    named = resources(data, str(path))
    if TENSORS not in named:
        raise BundleError(
            f"{path} does not name {TENSORS} with a SHA-256 of the whole file: sign the adapter's"
            f" folder with: model_signing sign key {adapter_folder} --private_key KEY.pem"
        )
    for name, digest in sorted(named.items()):
        found = _digest(adapter_folder, name)
        if found != digest:
            raise BundleError(
                f"{path} speaks of another {name} ({digest[:12]}, here is {found[:12] or 'none'}):"
                " sign the folder again with: model_signing sign"
            )
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def resources(data: bytes, name: str = "the bundle") -> dict[str, str]:
    """Hex SHA-256 by file name, as a bundle states them; whether it is true is not checked.

    Raises:
        BundleError: it is no model-signing bundle, or its digests contradict each other.
    """
    with _in_form(name):
        envelope = _envelope(data, name)
        statement = _object(json.loads(base64.b64decode(envelope["payload"], validate=True)))
        if not str(statement["predicateType"]).startswith(PREDICATE):
            raise BundleError(f"{name}: predicateType does not start with {PREDICATE}")
        listed = [_object(one) for one in statement["predicate"]["resources"]]
        # The subject is the folder: one digest over those of its files, in the order given.
        whole = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed))
        (subject,) = statement["subject"]
        if subject["digest"]["sha256"] != whole.hexdigest():
            raise BundleError(f"{name}: the subject's digest is not that of the files it names")
        return {
            str(one["name"]).removeprefix("./"): str(one["digest"]).lower()
            for one in listed
            if one.get("algorithm") == "sha256"
        }


def verify(data: bytes, public_key: bytes, name: str = "the bundle") -> None:
    """Refuse a bundle that this key has not signed (DSSE 1.0.2; ECDSA with P-256, P-384, P-521).

    Args:
        data: the bundle.
        public_key: SubjectPublicKeyInfo in PEM.
        name: for messages.

    Raises:
        BundleError: another key's signature, none, or no such key.
    """
    try:
        key = serialization.load_pem_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"the public key for {name} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in HASHES:
        raise BundleError(f"the public key for {name} is none of {', '.join(HASHES)}")
    with _in_form(name):
        envelope = _envelope(data, name)
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    kind = PAYLOAD_TYPE.encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    try:
        key.verify(signature, signed, ec.ECDSA(HASHES[key.curve.name]))
    except InvalidSignature:
        raise BundleError(
            f"{name} is not signed by the key given with --model-signing-key: give the public key"
            " of whoever signed it; a bundle of an identity or a certificate is verified with:"
            " model_signing verify"
        ) from None


def _envelope(data: bytes, name: str) -> dict[str, Any]:
    envelope = _object(json.loads(data)["dsseEnvelope"])
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise BundleError(f"{name}: payloadType is not {PAYLOAD_TYPE}")
    if not envelope["signatures"]:
        raise BundleError(f"{name} carries no signature")
    return envelope


@contextmanager
def _in_form(name: str) -> Iterator[None]:
    wrong = (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error)
    try:
        yield
    except wrong as error:
        raise BundleError(f"{name} is not an OpenSSF model-signing bundle: {error!r}") from None


def _digest(folder: Path, name: str) -> str:
    """Hex SHA-256 of a file of a folder; empty if there is none of that name."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return ""
    try:
        with (folder / path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(most + 1)
    except OSError as error:
        raise BundleError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _object(doc: Any) -> dict[str, Any]:
    if not isinstance(doc, dict):
        raise TypeError("an object is expected")
    return doc
