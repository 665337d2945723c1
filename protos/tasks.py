"""The nouns of one training round as they cross the wire, free of Flower's records.

``protos.flower`` converts them at the door. They know nothing of how training is done: the plan
and the privacy settings are mappings that the packages above wrote and will read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aggregation.adapter import Adapter, FloatArray


class ClientFault(StrEnum):
    """Why a client has no answer: all that it says, whatever went wrong inside."""

    BAD_TASK = "bad-task"
    WRONG_BASE = "wrong-base"
    NO_DATA = "no-data"
    BAD_DATA = "bad-data"
    BUDGET_EXCEEDED = "budget-exceeded"
    TRAINER_UNAVAILABLE = "trainer-unavailable"
    TRAINING_FAILED = "training-failed"
    MISSING_TENSORS = "missing-tensors"
    OUT_OF_RANGE = "out-of-range"
    SECURE_SUM = "secure-sum"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a client is asked to do in one round.

    Attributes:
        run: name of the run; with client and round it names a privacy event once and for all.
        round: number of the round, from 1.
        adapter: where training starts.
        plan: the training plan, as ``clients.training.TrainingPlan.to_mapping`` writes it.
        privacy: the local privacy, as ``privacy.budget.LocalPrivacy.to_mapping`` writes it.
        seed: root seed of the run; a client derives its own from it, its name and the round.
        data_folder: in a simulation, the folder of :func:`client_data` and :func:`client_ledger`;
            empty on a real device, which knows where its own data and ledger are.
        base: name of the base model, such as ``minilm``.
        assignment: what to train, send and keep, as ``aggregation.train.Assignment.to_mapping``
            writes it; empty for training and sending everything.
        codec: how the update travels back, as ``aggregation.codecs.read_codec`` reads it.
        beside: frozen adapters that the base carries besides the one that trains.
        held: digest of the adapter from which the client completed this one, which came without
            the tensors that the two share; empty if it came whole. Only a client reads it.
        secure: how its numbers enter a secure sum, as ``aggregation.secret_ring.Ring.to_mapping``
            writes it: the client then keeps its update and answers :class:`Ready`; empty for none.
    """

    run: str
    round: int
    adapter: Adapter
    plan: Mapping[str, Any]
    privacy: Mapping[str, Any] | None = None
    seed: int = 0
    data_folder: str = ""
    base: str = ""
    assignment: Mapping[str, Any] = field(default_factory=dict)
    codec: str = "float32"
    beside: tuple[Adapter, ...] = ()
    held: str = ""
    secure: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Measure an adapter on the client's own examples; fields as in :class:`TrainTask`."""

    run: str
    round: int
    adapter: Adapter
    plan: Mapping[str, Any] = field(default_factory=dict)
    data_folder: str = ""
    base: str = ""
    seed: int = 0
    assignment: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[Adapter, ...] = ()
    held: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """What one client measured.

    Attributes:
        client: the client's stable name.
        round: number of the round.
        examples: how many examples were measured.
        accuracy: share answered rightly, 0 to 1.
        loss: mean cross-entropy, in nats.
    """

    client: str
    round: int
    examples: int
    accuracy: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class SketchTask:
    """The second pass of a sketched sum (FedASK, 2507.09990): project what was just trained.

    Attributes:
        run: name of the run.
        round: number of the round, of whose training the client still has the factors.
        basis: by module, Q of shape (d_out, width), with orthonormal columns.
        data_folder: as in :class:`TrainTask`.
        base: likewise.
        secure: whether the projection is kept for a second secure sum, and answered with
            :class:`Ready`.
    """

    run: str
    round: int
    basis: Mapping[str, FloatArray]
    data_folder: str = ""
    base: str = ""
    secure: bool = False


@dataclass(frozen=True, kw_only=True)
class SketchReply:
    """A client's half of the second pass.

    Attributes:
        client: the client's stable name.
        round: number of the round.
        sketches: by module, Z of shape (d_in, width).
    """

    client: str
    round: int
    sketches: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Identity:
    """A client's stable name: Flower's node ids change from run to run, this doesn't.

    Attributes:
        client: the name.
        max_rank: the largest rank that the device can train; 0 if it does not say.
    """

    client: str
    max_rank: int = 0


def client_name(partition: int) -> str:
    """The stable name of a simulated client, and the stem of its data file.

    >>> client_name(3)
    'client-00003'
    """
    return f"client-{partition:05d}"


def client_data(data_folder: str, partition: int) -> Path:
    """Where a simulated client finds its examples: ``<data folder>/client-00003.jsonl``."""
    return Path(data_folder) / f"{client_name(partition)}.jsonl"


def client_ledger(data_folder: str) -> Path:
    """The ledger that simulated clients share: ``ledger.sqlite`` beside the data folder."""
    return Path(data_folder).parent / "ledger.sqlite"


def client_roster(data_folder: str) -> Path:
    """The identities of simulated clients: ``roster.json`` beside the data folder."""
    return Path(data_folder).parent / "roster.json"


def client_memory(data_folder: str) -> Path:
    """What simulated clients keep between rounds: ``memory`` beside the data folder."""
    return Path(data_folder).parent / "memory"
