"""From an adapter to a signed release: make, sign, publish; three acts, on as many machines.

*Make* turns an adapter's folder into a request: a folder with the payload, the ``adapters``
metadata as it will be once the release is in it, and the one that it follows. *Sign* needs that
folder and one private key, and no network; it leaves one small signature file, and the keys never
meet. *Publish* puts the signatures together and hands both to the repository, which counts them.

What a signer signs is what he can check: the payload against its digest, and that exactly one
release is new. The time is an argument; nothing here reads a clock or asks for a passphrase.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Signature  # type: ignore[attr-defined]  # it has no __all__

from aggregation import durable
from federation import roles
from federation.anchor import check_release
from federation.description import ReleaseError, ReleaseOptions
from federation.keys import Signer, key_name
from federation.published import ReleaseRecord
from federation.release_request import (
    MAX_PAYLOAD,
    PAYLOAD,
    REQUEST,
    SCHEMA,
    SIGNATURES,
    ReleaseRequest,
    describe,
    dump,
    make_request,
    read_file,
    read_request,
    read_wraps,
)
from federation.repository import Repository
from federation.revocation import (
    RevocationRequest,
    describe_revocation,
    is_revocation,
    make_revocation,
    read_revocation,
)
from federation.wrap_shelf import WrapShelf
from protos.canonical import canonical, canonical_exact
from protos.wraps import Wraps

__all__ = [
    "ReleaseError",
    "ReleaseOptions",
    "ReleaseRequest",
    "RevocationRequest",
    "assemble",
    "assemble_revocation",
    "describe",
    "describe_revocation",
    "is_revocation",
    "make_request",
    "make_revocation",
    "publish",
    "read_any",
    "read_request",
    "read_revocation",
    "read_wraps",
    "sign",
    "sign_request",
    "signed_so_far",
]


def sign(
    folder: Path, signer: Signer, *, out: Path | None = None, roots: Sequence[bytes] = ()
) -> Path:
    """Add one signature to a request; needs no network and no other key.

    Args:
        folder: the request.
        signer: an adapter key.
        out: the signature file; by default inside the request.
        roots: a root that the signer trusts, and any that followed it, in turn; not needed by a
            key that has signed what the request starts from.

    Returns:
        The signature file.

    Raises:
        ReleaseError: the request is not what it should be, so it is not signed.
        AnchorError: nothing says that it starts from what is published.
        StorageError: the signature can't be written.
    """
    return sign_request(read_any(folder), signer, out=out, roots=roots)


def sign_request(
    request: ReleaseRequest | RevocationRequest,
    signer: Signer,
    *,
    out: Path | None = None,
    roots: Sequence[bytes] = (),
) -> Path:
    """The same, for a request that has been read, and so checked, already.

    Raises:
        AnchorError: as for :func:`sign`.
        ReleaseError: it holds what cannot be signed, such as a number with a fraction.
        SignerError: the signer did not sign.
        StorageError: the signature can't be written.
    """
    check_release(request.folder, request.previous, signer.public_key, roots)
    try:
        content = canonical_exact(request.parsed.signed.to_dict())
    except ValueError as error:
        raise ReleaseError(f"{request.folder} cannot be signed: {error}") from None
    signature = signer.sign(content)
    keyid = signer.public_key.keyid
    doc = {
        "schema": SCHEMA,
        "release": request.name,
        "key": key_name(signer.public_key),
        "signature": signature.to_dict(),
        "signs_sha256": hashlib.sha256(content).hexdigest(),
    }
    path = out or request.folder / SIGNATURES / f"{keyid}.json"
    durable.write_bytes(path, dump(doc))
    return path


def assemble(folder: Path, signatures: Iterable[Path] = ()) -> tuple[bytes, bytes]:
    """The signed ``adapters`` metadata and the payload, ready to be published.

    Args:
        folder: the request, with the signatures that lie in it.
        signatures: further signature files.

    Raises:
        ReleaseError: a signature file is for another request, or not one.
    """
    request = read_request(folder)
    return _signed(request, signatures), read_file(request.folder / PAYLOAD, MAX_PAYLOAD)


def assemble_revocation(folder: Path, signatures: Iterable[Path] = ()) -> bytes:
    """The signed ``adapters`` metadata of a revocation, ready to be published.

    Raises:
        ReleaseError: a signature file is for another request, or not one.
    """
    return _signed(read_revocation(folder), signatures)


def read_any(folder: Path) -> ReleaseRequest | RevocationRequest:
    """A request of either kind, checked.

    Raises:
        ReleaseError: it is not what it should be; says why.
    """
    folder = folder.parent if folder.name == REQUEST else folder
    return read_revocation(folder) if is_revocation(folder) else read_request(folder)


def signed_so_far(folder: Path) -> list[str]:
    """Names of the keys whose signature files lie in a request; they are counted on publishing.

    Raises:
        ReleaseError: a signature file is for another request, or not one.
    """
    request = read_any(folder)
    expected = hashlib.sha256(canonical(request.parsed.signed.to_dict())).hexdigest()
    names = []
    for path in sorted((request.folder / SIGNATURES).glob("*.json")):
        _read_signature(path, expected)
        names.append(str(json.loads(read_file(path)).get("key", "?"))[:64])
    return sorted(names)


def publish(
    folder: Path, repository: Repository, *, now: datetime, signatures: Iterable[Path] = ()
) -> ReleaseRecord:
    """Put the signatures together and publish in a repository on this machine.

    Wrapped keys of an encrypted payload are kept beside it.

    Raises:
        ReleaseError: as for :func:`assemble`.
        PublishError: the repository refuses, for example for lack of signatures.
    """
    request = read_request(folder)
    metadata, data = _signed(request, signatures), read_file(request.folder / PAYLOAD, MAX_PAYLOAD)
    record = repository.publish_release(metadata, data, now=now)
    if record.statement.seal is not None:
        wraps = Wraps.from_bytes(read_wraps(request), record.sha256)
        WrapShelf(repository.folder).add(wraps)
    return record


def _signed(request: ReleaseRequest | RevocationRequest, signatures: Iterable[Path]) -> bytes:
    metadata = request.parsed
    expected = hashlib.sha256(canonical(metadata.signed.to_dict())).hexdigest()
    found = sorted((request.folder / SIGNATURES).glob("*.json"))
    for path in [*found, *signatures]:
        keyid, signature = _read_signature(path, expected)
        metadata.signatures[keyid] = signature
    return roles.to_bytes(metadata)


def _read_signature(path: Path, expected: str) -> tuple[str, Any]:
    try:
        doc = json.loads(read_file(path))
        if doc["signs_sha256"] != expected:
            raise ReleaseError(f"{path} signs another request: sign this one again")
        signature = Signature.from_dict(dict(doc["signature"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReleaseError(f"{path} is not a signature file: {error!r}") from None
    return str(signature.keyid), signature
