"""What clients keep for a secure sum, in the memory of the process that trains, and nowhere else.

A client that has trained gives its update to the desk and gets back an empty one, to be sent. The
update leaves the desk once, under masks. Nothing is written to disk: a process that restarts has
forgotten its secrets, and its client has dropped out of the sum.

A vector enters one session and no second one: two sums over two cohorts that differ in one client
would tell that client's vector. For the same reason a real device does not train again for a round
of which it has sent a masked vector already, whatever the server says has happened since.

Where clients add noise of their own, it is drawn for the session, after the vector is kept and
before it is masked: from the operating system's entropy on a device, so that no two sums share any.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from aggregation.errors import AggregationError
from aggregation.ring import Numbers
from aggregation.secret import Layout
from aggregation.secret_ring import Ring
from aggregation.update import Update
from clients.secure_identity import SecureIdentity
from clients.training import ClientJob
from privacy.discrete_gaussian import discrete_gaussian
from privacy.randomness import KEY_BYTES as NOISE_KEY_BYTES
from privacy.randomness import Stream, derive, seeded_key
from privacy.secure_client import SecureClient
from privacy.secure_messages import (
    KEY_BYTES,
    Confirmation,
    PublicKeys,
)
from privacy.secure_session import SecureSumAborted, SecureSumError, Session

SECOND = 1  # the part of a round with a second sum
RUNS = 64


@dataclass(frozen=True, kw_only=True)
class SecureRequest:
    """One step of a secure sum, as the device's own processes hand it on.

    Attributes:
        client: whose.
        run, round, part, step, names, blobs, dropouts, corrupt: as in ``protos.secure.SecureTask``;
            step ``keep`` keeps the float64 values under ``values`` for the second sum.
        identity: with which the client signs.
    """

    client: str
    run: str
    round: int
    part: int
    step: str
    names: tuple[str, ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    dropouts: float = 0.0
    corrupt: float = 0.0
    identity: SecureIdentity


@dataclass
class _Kept:
    """One client's round: its vectors that were not sent yet, and the session it is in."""

    run: str
    round: int
    ring: Ring
    weight: float
    vectors: dict[int, Numbers] = field(repr=False)
    seed: int = 0
    member: SecureClient | None = field(default=None, repr=False)
    part: int = -1


class SecureDesk:
    """The desk of one process.

    Args:
        once: whether a client never trains again for a round of which it has sent a masked vector:
            on real devices. A simulation may repeat its rounds.
    """

    def __init__(self, *, once: bool) -> None:
        self._once = once
        self._kept: dict[str, _Kept] = {}
        self._sent: dict[tuple[str, str], int] = {}  # last round by (client, run)
        self._lock = threading.Lock()

    def keep(self, job: ClientJob, update: Update) -> Update:
        """Keep an update for the round's sum.

        Args:
            job: what was asked, with the ring under ``secure``.
            update: what came of it.

        Returns:
            The update without anything that was trained, and without the weight.

        Raises:
            RingError: if a value or the weight is out of its range.
            SecureSumError: if this round was summed before.
        """
        ring = self.check(job, update.weight)
        layout = Layout(job.adapter.spec, job.assignment, ring)
        secret = layout.secret(update.adapter, job.adapter, update.weight, update.sketches)
        weight = 1.0 if ring.equal else update.weight
        kept = _Kept(job.run, job.round, ring, weight, {0: secret}, job.seed)
        with self._lock:
            self._kept[job.client] = kept
        steps = {key: value for key, value in update.metrics.items() if key == "steps"}
        return replace(
            update, adapter=job.adapter, weight=0.0, metrics=steps, parcel=None, sketches={}
        )

    def check(self, job: ClientJob, weight: float) -> Ring:
        """Refuse before anything is spent what :meth:`keep` would refuse anyway; gives the ring.

        Raises:
            RingError: if the weight is out of its range.
            SecureSumError: if this round was summed before.
        """
        ring = Ring.from_mapping(job.secure)
        if not ring.equal:
            ring.weights(np.array([weight]))
        self._refuse_again(job.client, job.run, job.round)
        return ring

    def step(self, request: SecureRequest) -> dict[str, bytes]:
        """Do one step; any trouble ends the client's part in the sum.

        Returns:
            The bytes to answer, by name, as in ``protos.secure.SecureReply``.

        Raises:
            SecureSumError: if the client is not in such a sum, or not at this step.
            SecureSumAborted: if going on would give something away.
        """
        with self._lock:
            kept = self._kept.get(request.client)
            if kept is None or (kept.run, kept.round) != (request.run, request.round):
                raise SecureSumError(
                    f"{request.client} has nothing kept of round {request.round}: its process has "
                    "restarted, or the round is over"
                )
            try:
                return self._step(kept, request)
            except (SecureSumError, AggregationError):
                del self._kept[request.client]
                raise
            except ValueError as error:  # a public key that X25519 does not take
                del self._kept[request.client]
                raise SecureSumError(f"step {request.step}: {error}") from None

    def _step(self, kept: _Kept, request: SecureRequest) -> dict[str, bytes]:
        if request.step == "keep":
            return self._keep_second(kept, request)
        if request.step == "keys":
            return self._keys(kept, request)
        member = kept.member
        if member is None or kept.part != request.part:
            raise SecureSumError(f"{request.client} is in no sum {request.part} of this round")
        blobs = request.blobs
        if request.step == "pieces":
            sealed = member.share([_public_keys(name, blob) for name, blob in blobs.items()])
            return dict(sealed.sealed)
        if request.step == "masked":
            self._refuse_again(request.client, request.run, request.round, part=request.part)
            self._note(request.client, request.run, request.round)
            vector = kept.vectors.pop(request.part)
            if kept.ring.noise:
                vector = vector + self._noise(kept, member, vector.size)
            masked = member.mask(vector, blobs)
            return {"vector": kept.ring.to_bytes(masked.values)}
        if request.step == "confirm":
            self._enough(kept.ring, len(request.names), "are in the sum")
            return {"signature": member.confirm(request.names).signature}
        if request.step == "reveal":
            given = member.reveal([Confirmation(name, blob) for name, blob in blobs.items()])
            kept.member = None
            return {
                **{f"own/{name}": piece for name, piece in given.own.items()},
                **{f"masking/{name}": piece for name, piece in given.masking.items()},
            }
        raise SecureSumError(f"a secure sum has no step {request.step!r}")

    def _keys(self, kept: _Kept, request: SecureRequest) -> dict[str, bytes]:
        if kept.part >= request.part or request.part not in kept.vectors:
            raise SecureSumError(
                f"{request.client} was asked into a sum {request.part} of round {request.round} "
                "for which it has no vector, or which it is in already"
            )
        self._enough(kept.ring, len(request.names), "are to be summed")
        sign, roster = request.identity.load(request.client)
        strangers = sorted(set(request.names) - set(roster.members))
        if strangers:
            raise SecureSumError(
                f"{len(strangers)} of the cohort are not in the roster, such as {strangers[0]}"
            )
        session = Session.of(
            request.run,
            request.round,
            request.names,
            length=kept.vectors[request.part].size,
            dropouts=request.dropouts,
            corrupt=request.corrupt,
            part=request.part,
        )
        kept.member = SecureClient(session, request.client, sign=sign, verify=roster.verify)
        kept.part = request.part
        keys = kept.member.advertise()
        return {"keys": keys.sealing + keys.masking + keys.signature}

    def _keep_second(self, kept: _Kept, request: SecureRequest) -> dict[str, bytes]:
        """Keep the answer to a second pass, times the same weight as the first."""
        if kept.part != SECOND - 1 or kept.member is not None or kept.vectors:
            raise SecureSumError(f"{request.client} is not done with the first sum of this round")
        values = np.frombuffer(request.blobs.get("values", b""), "<f8")
        kept.vectors[SECOND] = kept.ring.wide.numbers(values, kept.weight)
        return {}

    def _noise(self, kept: _Kept, member: SecureClient, size: int) -> Numbers:
        """This client's share of the noise: fresh for every session, whatever was in it before."""
        session = member.session.digest.hex()
        key = (
            os.urandom(NOISE_KEY_BYTES)
            if self._once
            else derive(seeded_key(kept.seed), "share", kept.run, member.member, session)
        )
        drawn = discrete_gaussian(Stream(key), kept.ring.share, size)
        return drawn.astype(np.uint32)  # modulo 2^32, as everything in the sum

    @staticmethod
    def _enough(ring: Ring, count: int, what: str) -> None:
        """Refuse a sum whose noise would be less than what was counted on.

        Raises:
            SecureSumAborted: if so few clients are in it.
        """
        if count < ring.least:
            raise SecureSumAborted(
                f"{count} clients {what}; with fewer than {ring.least} their noise would be less "
                "than was counted on"
            )

    def _refuse_again(self, client: str, run: str, number: int, part: int = 0) -> None:
        if self._once and part == 0 and self._sent.get((client, run), 0) >= number:
            raise SecureSumError(
                f"{client} has sent its masked vector of round {number} already; two sums of one "
                "round could be compared"
            )

    def _note(self, client: str, run: str, number: int) -> None:
        self._sent[client, run] = number
        while len(self._sent) > RUNS:
            del self._sent[next(iter(self._sent))]


def _public_keys(name: str, blob: bytes) -> PublicKeys:
    keys = (blob[:KEY_BYTES], blob[KEY_BYTES : 2 * KEY_BYTES], blob[2 * KEY_BYTES :])
    return PublicKeys(name, *keys)
