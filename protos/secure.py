"""The nouns of a secure sum as they cross the wire; who reads them knows what the bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEPS = ("keys", "pieces", "masked", "confirm", "reveal")


@dataclass(frozen=True, kw_only=True)
class SecureTask:
    """One step of a secure sum, asked of one member.

    Attributes:
        run: name of the run.
        round: number of the round.
        part: which sum of the round, from 0.
        step: one of :data:`STEPS`.
        names: step ``keys``: the members; ``confirm``: those whose vectors came.
        blobs: by member: ``pieces``: its public keys and their signature, one after the other;
            ``masked``: what it has sealed for the receiver; ``reveal``: its signature over the list
            of survivors.
        dropouts: step ``keys``: share of the members that may drop out.
        corrupt: step ``keys``: share of them that may be in league with the server.
        seed: root seed of the run: identities of simulated members derive from it.
        data_folder: as in :class:`protos.tasks.TrainTask`.
        base: likewise.
    """

    run: str
    round: int
    part: int
    step: str
    names: tuple[str, ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    dropouts: float = 0.0
    corrupt: float = 0.0
    seed: int = 0
    data_folder: str = ""
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class SecureReply:
    """What a member answers to one step.

    Attributes:
        client: the member's stable name.
        round: number of the round.
        part: which sum of the round.
        step: which step.
        blobs: ``keys``: under ``keys``, its public keys and their signature; ``pieces``: what it
            has sealed, by receiver; ``masked``: under ``vector``, its masked vector; ``confirm``:
            under ``signature``, that over the survivors; ``reveal``: the pieces that it gives up,
            under ``own/NAME`` or ``masking/NAME``.
    """

    client: str
    round: int
    part: int
    step: str
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A client that has trained and keeps its update for a secure sum.

    Attributes:
        client: the client's stable name.
        round: number of the round.
        start: digest of the adapter that training started from; empty after the second pass.
        privacy_event: what the training has spent; empty without example-level privacy.
        metrics: numbers that do not depend on the examples.
    """

    client: str
    round: int
    start: str = ""
    privacy_event: Mapping[str, int | float | str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
