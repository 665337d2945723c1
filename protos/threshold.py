"""Counting the signatures under a file: a threshold is of keys, not of names for keys.

The Update Framework (1.0.34, section 4.2) lets a key's identifier be anything that is unique, and
python-tuf counts identifiers. One key that is listed under two of them would so reach a threshold
of two alone, with one signature under each. Here the keys themselves are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from tuf.api.exceptions import UnsignedMetadataError


def verify_threshold(
    delegator: Any, role: str, content: bytes, signatures: Mapping[str, Any]
) -> None:
    """Refuse a file that too few different keys have signed.

    Args:
        delegator: root or targets of python-tuf, which names the keys of the role.
        role: whose file it is.
        content: the bytes that are signed.
        signatures: by identifier of the key.

    Raises:
        UnsignedMetadataError: of tuf: fewer different keys than the threshold.
        ValueError: the delegator does not delegate to such a role.
    """
    result = delegator.get_verification_result(role, content, dict(signatures))
    different = len(result.signed)
    if result.threshold > 1:
        different = len({_material(key) for key in result.signed.values()})
    if different < result.threshold:
        raise UnsignedMetadataError(f"{role} was signed by {different}/{result.threshold} keys")


def _material(key: Any) -> bytes:
    """A key as it is, however it is written; its signature has been verified, so it can be read.

    >>> from types import SimpleNamespace as Key
    >>> one, same = (Key(keyval={"public": text}) for text in ("ab" * 32, "AB" * 32))
    >>> _material(one) == _material(same)
    True
    """
    public = str(key.keyval.get("public", ""))
    try:
        if "-----BEGIN" in public:
            form = PublicFormat.SubjectPublicKeyInfo
            return load_pem_public_key(public.encode()).public_bytes(Encoding.DER, form)
        return bytes.fromhex(public) or repr(key.keyval).encode()
    except ValueError:  # of a kind that is written in another way
        return repr(key.keyval).encode()
