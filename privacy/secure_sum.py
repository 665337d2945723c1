"""Secure aggregation: the server learns the sum of the members' vectors, and no vector.

The protocol is that of Bell et al. 2020 ("Secure single-server aggregation with (poly)logarithmic
overhead", SecAgg+), which for a complete graph is that of Bonawitz et al. 2017 ("Practical secure
aggregation for privacy-preserving machine learning"), with the signatures and the consistency
check of the latter's section 4. Vectors are uint32 modulo 2^32; see ``aggregation.ring`` for how
numbers become such values.

====  ===============================================================  ==========================
step  a member sends                                                   through the server to
====  ===============================================================  ==========================
0     two public keys, signed by its enrolled identity                 its neighbours
1     pieces of its two secrets, each sealed to its holder             their holders
2     its vector + own mask + masks shared with each neighbour         nobody: the server
3     a signature over the list of those whose vector came             its neighbours
4     one piece per neighbour: own mask (came) or masking key (not)    nobody: the server
====  ===============================================================  ==========================

Masks shared by two members cancel in the sum. For a member that dropped out before step 2 they do
not, and its masking key is put together from pieces; the own mask is what protects a vector that
was late and not lost. With fewer pieces than the threshold nothing is put together and the sum is
given up: :class:`SecureSumAborted`.

**Protected against**: a server that follows the protocol, in league with fewer members than the
threshold; and one that lies about who dropped out, as long as the roster of identities is right
and fewer than ``2 threshold - holders`` of a member's holders are in league with it: two different
lists of survivors would each need ``threshold`` honest signatures. **Not protected**: what the sum
itself says (add client-level differential privacy for that); who took part, when, with how many
values; wrong sums from members that lie about their own vector; a roster that the server itself
has made up; members that never answer, which end the sum (that is denial, not disclosure).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy import shamir
from privacy.secure_client import Ring, SecureClient, add_keystream, add_pair_mask
from privacy.secure_messages import (
    Confirmation,
    MaskedVector,
    PublicKeys,
    Revealed,
    SealedPieces,
)
from privacy.secure_session import SecureSumAborted, SecureSumError, Session

__all__ = [
    "Confirmation",
    "MaskedVector",
    "PublicKeys",
    "Revealed",
    "SealedPieces",
    "SecureClient",
    "SecureServer",
    "SecureSumAborted",
    "SecureSumError",
    "Session",
]


class SecureServer:
    """The server's side: it passes messages on, adds masked vectors, and takes the masks off.

    Each method takes what came in a step (whoever is missing has dropped out) and returns what goes
    out in the next.

    Args:
        session: what is summed, and by whom.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._keys: dict[str, PublicKeys] = {}
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._survivors: tuple[str, ...] = ()
        self._total: Ring = np.zeros(session.length, np.uint32)

    def keys(self, messages: Sequence[PublicKeys]) -> dict[str, list[PublicKeys]]:
        """After step 0: for each member the keys of its neighbours."""
        self._keys = {m.member: m for m in messages if m.member in self.session.members}
        self._enough(len(self._keys), "advertised their keys")
        return {
            member: [self._keys[n] for n in self.session.neighbours(member) if n in self._keys]
            for member in self._keys
        }

    def pieces(self, messages: Sequence[SealedPieces]) -> dict[str, dict[str, bytes]]:
        """After step 1: for each member that shared, what its neighbours sealed for it."""
        self._sealed = {m.member: m.sealed for m in messages if m.member in self._keys}
        self._enough(len(self._sealed), "shared their secrets")
        return {
            member: {
                other: self._sealed[other][member]
                for other in self.session.neighbours(member)
                if other in self._sealed and member in self._sealed[other]
            }
            for member in self._sealed
        }

    def add(self, message: MaskedVector) -> None:
        """In step 2: add one masked vector to the sum; it is not kept.

        Raises:
            SecureSumError: if it is not one of this session, or came twice.
        """
        values = message.values
        if message.member not in self._sealed or message.member in self._survivors:
            raise SecureSumError(f"{message.member} has no vector to send in this sum")
        if values.dtype != np.uint32 or values.shape != (self.session.length,):
            raise SecureSumError(
                f"{message.member}: {values.dtype} of shape {values.shape}, expected uint32 of "
                f"shape ({self.session.length},)"
            )
        np.add(self._total, values, out=self._total)
        self._survivors = (*self._survivors, message.member)

    def fingerprint(self, *, seeded: bool = False) -> str:
        """Hex SHA-256 of what is about to be unmasked: of the masked sum, and whose it is.

        No two sums have the same, since masks are drawn anew for each.

        Args:
            seeded: whether everything of the members, their noise included, derives from a seed, as
                in simulations: a sum of the same members is then the same sum, and has the same
                fingerprint, since the masks are left out of it.
        """
        whose = "\0".join(sorted(self._survivors)).encode()
        digest = hashlib.sha256(self.session.digest + hashlib.sha256(whose).digest())
        if not seeded:
            digest.update(self._total.astype("<u4", copy=False).tobytes())
        return digest.hexdigest()

    def survivors(self) -> tuple[str, ...]:
        """After step 2: those whose vector is in the sum.

        Raises:
            SecureSumAborted: if they are too few.
        """
        self._enough(len(self._survivors), "sent their vector")
        return tuple(sorted(self._survivors))

    def confirmations(self, messages: Sequence[Confirmation]) -> dict[str, list[Confirmation]]:
        """After step 3: for each member that confirmed, what its neighbours confirmed."""
        by_member = {m.member: m for m in messages if m.member in self._survivors}
        self._enough(len(by_member), "confirmed the survivors")
        return {
            member: [by_member[n] for n in self.session.neighbours(member) if n in by_member]
            for member in by_member
        }

    def total(self, messages: Sequence[Revealed]) -> Ring:
        """After step 4: the sum of the survivors' vectors, modulo 2^32.

        Raises:
            SecureSumAborted: if too few pieces of a secret came, or one of them is wrong.
        """
        survivors = set(self._survivors)
        total = self._total.copy()
        for member in sorted(survivors):
            secret = self._join(member, messages, dropped=False)
            add_keystream(total, secret, self.session, "own", negative=True)
        for member in sorted(self._sealed.keys() - survivors):
            others = [
                n for n in self.session.neighbours(member) if n in survivors
                and n in self._sealed[member]
            ]  # fmt: skip
            if not others:
                continue
            mine = X25519PrivateKey.from_private_bytes(self._join(member, messages, dropped=True))
            public = mine.public_key().public_bytes_raw()
            if public != self._keys[member].masking:
                raise SecureSumAborted(f"the pieces of {member}'s masking key do not fit its key")
            for other in others:
                peer = X25519PublicKey.from_public_bytes(self._keys[other].masking)
                # The member's own half would have cancelled what the survivor added.
                add_pair_mask(total, mine.exchange(peer), self.session, member, other)
        return total

    def _join(self, member: str, messages: Sequence[Revealed], *, dropped: bool) -> bytes:
        holders = self.session.holders(member)
        pieces = {}
        for message in messages:
            piece = (message.masking if dropped else message.own).get(member)
            if piece is not None and message.member in holders:
                pieces[holders[message.member]] = piece
        if len(pieces) < self.session.threshold:
            raise SecureSumAborted(
                f"{len(pieces)} pieces of {member}'s secret came, {self.session.threshold} are "
                "needed: too many members dropped out"
            )
        try:
            return shamir.join(pieces)
        except shamir.SharingError as error:
            raise SecureSumAborted(f"{member}: {error}") from None

    def _enough(self, count: int, what: str) -> None:
        least = min(self.session.threshold, len(self.session.members))
        if count < least:
            raise SecureSumAborted(
                f"{count} of {len(self.session.members)} members {what}; at least {least} are "
                "needed to go on"
            )
