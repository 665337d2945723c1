"""Devices named one by one inside a round, without their names: short digests, packed.

A wave over tags and inventory reaches devices that no bucket describes. The round then carries a
token of each, six bytes of SHA-256 over the round's salt and the device's name; a device finds its
own. Two devices of a fleet of 100,000 share one with a chance of 4e-6 for 10,000 members, and then
one more device takes the release.

    >>> packed = pack_members("spring", ["d-1", "d-2"])
    >>> is_member(packed, "spring", "d-2"), is_member(packed, "spring", "d-3"), len(packed)
    (True, False, 16)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable

from protos.errors import WireError

TOKEN_BYTES = 6
MAX_MEMBERS = 20_000  # 160 kB of metadata
MAX_PACKED = MAX_MEMBERS * TOKEN_BYTES * 4 // 3


def pack_members(salt: str, devices: Iterable[str]) -> str:
    """The tokens of these devices in base64, sorted, so that their order tells nothing.

    Raises:
        WireError: more than :data:`MAX_MEMBERS`.
    """
    tokens = sorted({_token(salt, device) for device in devices})
    if len(tokens) > MAX_MEMBERS:
        raise WireError(
            f"a round names {len(tokens)} devices, at most {MAX_MEMBERS}: use a percentage instead"
        )
    return base64.b64encode(b"".join(tokens)).decode()


def check_members(packed: object) -> str:
    """The text, if it can be a list of tokens.

    Raises:
        WireError: no text, too long, not base64, or a broken token.
    """
    if not isinstance(packed, str) or len(packed) > MAX_PACKED:
        raise WireError(f"members is not a string of at most {MAX_PACKED} characters")
    try:
        if len(base64.b64decode(packed, validate=True)) % TOKEN_BYTES:
            raise WireError("members has a broken token at its end")
    except (binascii.Error, ValueError) as error:
        raise WireError(f"members is not base64: {error}") from None
    return packed


def is_member(packed: str, salt: str, device_id: str) -> bool:
    """Whether a device's token is in the list."""
    # A token is eight characters of base64 on a boundary of eight: no need to decode them all.
    mine = base64.b64encode(_token(salt, device_id)).decode()
    return any(packed[i : i + 8] == mine for i in range(0, len(packed), 8))


def _token(salt: str, device_id: str) -> bytes:
    return hashlib.sha256(f"member:{salt}:{device_id}".encode()).digest()[:TOKEN_BYTES]
