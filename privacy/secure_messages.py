"""What members and server tell each other in a secure sum, and the exact bytes that are signed.

Everything is a plain value; ``to_mapping`` and ``from_mapping`` (bytes as they are) serve whoever
carries them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from privacy.secure_session import SecureSumError, Session

KEY_BYTES = 32


@dataclass(frozen=True)
class PublicKeys:
    """A member's two fresh X25519 public keys (RFC 7748).

    Attributes:
        member: whose.
        sealing: pieces for this member are sealed to it.
        masking: the shared masks come from it.
        signature: by the member's enrolled identity over :meth:`statement`.

    Raises:
        SecureSumError: if a key has another length.
    """

    member: str
    sealing: bytes
    masking: bytes
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.sealing) != KEY_BYTES or len(self.masking) != KEY_BYTES:
            raise SecureSumError(f"the keys of {self.member} must have {KEY_BYTES} bytes each")

    def statement(self, session: Session) -> bytes:
        """What is signed: session, name and both keys."""
        who = hashlib.sha256(self.member.encode()).digest()
        return b"airpeft secure sum keys\0" + session.digest + who + self.sealing + self.masking

    def signed(self, signature: bytes) -> PublicKeys:
        """The same with a signature."""
        return replace(self, signature=signature)


@dataclass(frozen=True)
class SealedPieces:
    """What a member sealed for each neighbour: a piece of its own mask and of its masking key."""

    member: str
    sealed: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, eq=False)
class MaskedVector:
    """A member's vector under all its masks; uint32."""

    member: str
    values: npt.NDArray[np.uint32] = field(repr=False)


@dataclass(frozen=True)
class Confirmation:
    """A member's signature over the list of those that are in the sum."""

    member: str
    signature: bytes


@dataclass(frozen=True)
class Revealed:
    """The pieces that a member gives up: of each neighbour one kind, never both.

    Attributes:
        member: who reveals.
        own: pieces of the own masks of those in the sum, by member.
        masking: pieces of the masking keys of those that dropped out, by member.
    """

    member: str
    own: Mapping[str, bytes] = field(repr=False)
    masking: Mapping[str, bytes] = field(repr=False)


def survivors_statement(session: Session, survivors: Sequence[str]) -> bytes:
    """What a confirmation signs."""
    names = hashlib.sha256("\0".join(sorted(survivors)).encode()).digest()
    return b"airpeft secure sum survivors\0" + session.digest + names
