"""A member's side of a secure sum.

The five steps, each called once and in this order; see :mod:`privacy.secure_sum` for the protocol
and for what it does and does not protect::

    keys = client.advertise()
    sealed = client.share(everybodys_keys)
    masked = client.mask(vector, pieces_for_me)
    confirmed = client.confirm(survivors)
    revealed = client.reveal(everybodys_confirmations)

Secrets live in this object alone. It is never written to disk: a member that restarts has dropped
out of this sum.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from privacy import shamir
from privacy.randomness import derive
from privacy.secure_messages import (
    Confirmation,
    MaskedVector,
    PublicKeys,
    Revealed,
    SealedPieces,
    survivors_statement,
)
from privacy.secure_session import SecureSumAborted, SecureSumError, Session

Ring = npt.NDArray[np.uint32]
Sign = Callable[[bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]

NONCE = bytes(12)  # each sealing key is used once
_CHUNK = 1 << 15
_ZEROS = memoryview(bytes(4 * _CHUNK))


class SecureClient:
    """One member of one session.

    Args:
        session: what is summed, and by whom.
        member: this member's name.
        sign: signs with the member's enrolled identity.
        verify: whether a signature over a message is that of a named member, by the roster of
            enrolled identities that this member trusts; never asked about names outside of it.
        entropy: fresh random bytes.
        below: a fresh uniform number below a bound.

    Raises:
        SecureSumError: if the member is not in the session.
    """

    def __init__(
        self,
        session: Session,
        member: str,
        *,
        sign: Sign,
        verify: Verify,
        entropy: Callable[[int], bytes] = os.urandom,
        below: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self.session, self.member = session, member
        self._neighbours = session.neighbours(member)
        self._sign, self._verify, self._below = sign, verify, below
        self._sealing = X25519PrivateKey.from_private_bytes(entropy(32))
        self._masking = entropy(32)  # an X25519 key as bytes, since it is shared in pieces
        self._own = entropy(32)
        self._keys: dict[str, PublicKeys] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}  # (piece of own mask, of masking key)
        self._survivors: tuple[str, ...] = ()
        self._step = 0

    def advertise(self) -> PublicKeys:
        """The public halves of two fresh key pairs, signed together with the session."""
        self._enter(0)
        keys = PublicKeys(
            self.member,
            self._sealing.public_key().public_bytes_raw(),
            X25519PrivateKey.from_private_bytes(self._masking).public_key().public_bytes_raw(),
            b"",
        )
        return keys.signed(self._sign(keys.statement(self.session)))

    def share(self, keys: Sequence[PublicKeys]) -> SealedPieces:
        """Split both secrets among the neighbours that are there, each piece sealed to its holder.

        Raises:
            SecureSumAborted: if a key is not signed by its owner, or too few neighbours are there.
        """
        self._enter(1)
        for one in keys:
            if one.member == self.member or one.member not in self._neighbours:
                continue
            if not self._verify(one.member, one.statement(self.session), one.signature):
                raise SecureSumAborted(
                    f"the keys of {one.member} are not signed by its enrolled identity: somebody "
                    "in between, or a roster that is out of date"
                )
            self._keys[one.member] = one
        public = [key.masking for key in self._keys.values()]
        public += [key.sealing for key in self._keys.values()]
        if len(set(public)) != len(public):
            raise SecureSumAborted("two members came with the same key")
        self._require(1 + len(self._keys), "neighbours advertised their keys")
        holders = self.session.holders(self.member)
        sizes = {"holders": len(holders), "threshold": self.session.threshold}
        own = shamir.split(self._own, **sizes, below=self._below)
        masking = shamir.split(self._masking, **sizes, below=self._below)
        mine = holders[self.member]
        self._held[self.member] = own[mine], masking[mine]
        sealed = {}
        for holder in self._keys:
            number = holders[holder]
            box = self._box(self.member, holder)
            sealed[holder] = box.encrypt(NONCE, own[number] + masking[number], self.session.digest)
        return SealedPieces(self.member, sealed)

    def mask(self, vector: Ring, sealed: Mapping[str, bytes]) -> MaskedVector:
        """The vector under its own mask and one for each neighbour that shared its secrets.

        Args:
            vector: uint32 of the session's length.
            sealed: what each such neighbour sealed for this member, by its name.

        Raises:
            SecureSumError: if the vector has another shape.
            SecureSumAborted: if a piece does not open, or too few came.
        """
        self._enter(2)
        if vector.dtype != np.uint32 or vector.shape != (self.session.length,):
            raise SecureSumError(
                f"the vector is {vector.dtype} of shape {vector.shape}; expected uint32 of shape "
                f"({self.session.length},)"
            )
        for sender, box in sealed.items():
            if sender not in self._keys:
                raise SecureSumAborted(f"{sender} sent pieces without having advertised its keys")
            try:
                plain = self._box(sender, self.member).decrypt(NONCE, box, self.session.digest)
            except InvalidTag:
                raise SecureSumAborted(f"the pieces of {sender} do not open") from None
            if len(plain) != 2 * shamir.PIECE_BYTES:
                raise SecureSumAborted(f"the pieces of {sender} are malformed")
            self._held[sender] = plain[: shamir.PIECE_BYTES], plain[shamir.PIECE_BYTES :]
        self._require(len(self._held), "neighbours shared their secrets")
        total = vector.copy()
        add_keystream(total, self._own, self.session, "own")
        for other in self._held:
            if other != self.member:
                add_pair_mask(total, self._pair(other), self.session, self.member, other)
        return MaskedVector(self.member, total)

    def confirm(self, survivors: Sequence[str]) -> Confirmation:
        """Sign the list of those whose vectors are in the sum; one list, once.

        Raises:
            SecureSumAborted: if this member is not on it, or it is too short to hide anybody.
        """
        self._enter(3)
        listed = set(survivors)
        if len(listed) != len(survivors) or not listed <= set(self.session.members):
            raise SecureSumAborted("the list of survivors names strangers, or a member twice")
        if self.member not in listed:
            raise SecureSumAborted("the list of survivors leaves this member out, though it sent")
        if any(name in self._neighbours and name not in self._held for name in listed):
            raise SecureSumAborted("the list of survivors names one that shared no secrets")
        self._require(len(listed & self._held.keys()), "neighbours are in the sum")
        self._survivors = tuple(sorted(listed))
        statement = survivors_statement(self.session, self._survivors)
        return Confirmation(self.member, self._sign(statement))

    def reveal(self, confirmations: Sequence[Confirmation]) -> Revealed:
        """For each neighbour one piece: of its own mask if it survived, else of its masking key.

        Never both of one member: together they would open its vector.

        Raises:
            SecureSumAborted: if too few neighbours signed the very list that this member signed.
        """
        self._enter(4)
        statement = survivors_statement(self.session, self._survivors)
        agreed = {self.member}
        for one in confirmations:
            if (
                one.member in self._held
                and one.member in self._survivors
                and one.member != self.member
                and self._verify(one.member, statement, one.signature)
            ):
                agreed.add(one.member)
        self._require(len(agreed), "neighbours confirmed the same list of survivors")
        own = {m: held[0] for m, held in self._held.items() if m in self._survivors}
        masking = {m: held[1] for m, held in self._held.items() if m not in self._survivors}
        self._held = {}
        return Revealed(self.member, own, masking)

    def _pair(self, other: str) -> bytes:
        mine = X25519PrivateKey.from_private_bytes(self._masking)
        return mine.exchange(X25519PublicKey.from_public_bytes(self._keys[other].masking))

    def _box(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        other = receiver if sender == self.member else sender
        peer = X25519PublicKey.from_public_bytes(self._keys[other].sealing)
        secret = self._sealing.exchange(peer)
        label = derive(self.session.digest, "seal", sender, receiver).hex()
        return ChaCha20Poly1305(derive(secret, label))

    def _require(self, count: int, what: str) -> None:
        if count < self.session.threshold:
            raise SecureSumAborted(
                f"{count} {what}, this member included; {self.session.threshold} are needed to "
                "finish without giving a vector away"
            )

    def _enter(self, step: int) -> None:
        if step != self._step:
            raise SecureSumError(
                f"step {step} of the secure sum was asked for at step {self._step}: each is done "
                "once, in order"
            )
        self._step += 1


def add_keystream(
    total: Ring, secret: bytes, session: Session, purpose: str, *, negative: bool = False
) -> None:
    """Add a ChaCha20 keystream (RFC 8439, section 2.4) to a vector in place, as uint32 values.

    Args:
        total: uint32 of the session's length.
        secret: what the stream's key is derived from, together with session and purpose.
        session: what is summed.
        purpose: a word; other words give other streams.
        negative: subtract instead.
    """
    key = derive(secret, session.digest.hex(), purpose)
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    stream = np.empty(_CHUNK, "<u4")  # a chunk stays in the cache, and no page is touched twice
    for start in range(0, total.size, _CHUNK):
        part = total[start : start + _CHUNK]
        chunk = stream[: part.size]
        cipher.update_into(_ZEROS[: 4 * part.size], chunk.data.cast("B"))
        (np.subtract if negative else np.add)(part, chunk, out=part)


def add_pair_mask(total: Ring, secret: bytes, session: Session, member: str, other: str) -> None:
    """Add in place what ``member`` adds for ``other``, which is minus what ``other`` adds."""
    add_keystream(total, secret, session, "pair", negative=member > other)
