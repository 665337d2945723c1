"""What a client is asked to do in one round, and how its batches are drawn.

    >>> plan = TrainingPlan(sample_rate=0.25, epochs=2.0, learning_rate=1e-3)
    >>> plan.rate(1000), plan.steps_per_round(1000)
    (0.25, 8)
    >>> TrainingPlan.from_mapping(plan.to_mapping()) == plan
    True

Nothing here touches torch. Seeds derive by hashing from (root seed, client, round), so the order in
which clients train, and where, changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.train import Assignment
from clients.data import DataSource, Examples
from clients.errors import ClientError
from privacy.budget import LocalPrivacy
from privacy.events import SgdEvent
from privacy.randomness import Stream

OPTIMIZERS = ("adamw", "sgd")
# Tokens, padding included, that go through the model at once: enough for the matrix kernels,
# small enough for the caches.
PART_TOKENS = 2048
MAX_STEPS = 100_000
MAX_LENGTH = 512

Indices = npt.NDArray[np.int64]


class PlanError(ClientError):
    """A training plan that contradicts itself, or does not fit the client's data."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a client trains in one round.

    Attributes:
        epochs: expected passes over the client's examples per round; may be a fraction.
        steps: number of steps per round, instead of ``epochs``.
        batch_size: examples per step (expected, with privacy); or give ``sample_rate``.
        sample_rate: share of the client's examples per step; the same for all clients gives them
            the same noise for the same epsilon.
        learning_rate: of the low-rank factors.
        head_learning_rate: of the tensors trained whole; None for ``learning_rate``.
        optimizer: ``adamw`` (without weight decay) or ``sgd`` (with momentum).
        momentum: of ``sgd``.
        max_length: tokens of a text that are read.
        physical_batch: at most so many examples go through the model at once; the rest of a batch
            follows, and the step is made of all of it. None for as many as are quickest.

    Raises:
        PlanError: if a value is out of its bounds or two contradict each other.
    """

    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int | None = None
    sample_rate: float | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    max_length: int = 32
    physical_batch: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.sample_rate is not None:
            raise PlanError("plan: give batch_size or sample_rate, not both")
        if self.batch_size is None and self.sample_rate is None:
            object.__setattr__(self, "batch_size", 32)
        _within("learning_rate", self.learning_rate, 0, 100)
        if self.head_learning_rate is not None:
            _within("head_learning_rate", self.head_learning_rate, 0, 100)
        _within("epochs", self.epochs, 0, 10_000)
        if self.steps is not None:
            _whole("steps", self.steps, 1, MAX_STEPS)
        if self.batch_size is not None:
            _whole("batch_size", self.batch_size, 1, 1 << 20)
        if self.sample_rate is not None:
            _within("sample_rate", self.sample_rate, 0, 1)
        if self.optimizer not in OPTIMIZERS:
            raise PlanError(
                f"plan: optimizer={self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
            )
        if not 0 <= self.momentum < 1:
            raise PlanError(f"plan: momentum={self.momentum} is outside 0..1 (1 excluded)")
        _whole("max_length", self.max_length, 4, MAX_LENGTH)
        if self.physical_batch is not None:
            _whole("physical_batch", self.physical_batch, 1, 1 << 20)

    def rate(self, examples: int) -> float:
        """The share of ``examples`` in one step."""
        if self.sample_rate is not None:
            return self.sample_rate
        assert self.batch_size is not None  # noqa: S101 - narrows the type
        return min(1.0, self.batch_size / examples)

    def steps_per_round(self, examples: int) -> int:
        """How many steps a client with so many examples makes in a round."""
        if self.steps is not None:
            return self.steps
        return min(MAX_STEPS, max(1, math.ceil(self.epochs / self.rate(examples) - 1e-9)))

    def event(self, examples: int, privacy: LocalPrivacy, noise_multiplier: float) -> SgdEvent:
        """The privacy event of one round.

        Raises:
            PlanError: if a batch would be larger than the data.
            BudgetError: if delta is too large for so few examples.
        """
        privacy.check_examples(examples)
        if self.batch_size is not None and self.batch_size > examples:
            raise PlanError(
                f"plan: batch_size={self.batch_size} is larger than the data ({examples} "
                "examples): with privacy, give sample_rate instead, or a smaller batch_size"
            )
        return SgdEvent(
            noise_multiplier=noise_multiplier,
            sample_rate=self.rate(examples),
            steps=self.steps_per_round(examples),
            max_grad_norm=privacy.max_grad_norm,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message or a file; fields that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainingPlan:
        """The inverse of :meth:`to_mapping`; whole numbers may stand for fractions.

        Raises:
            PlanError: on a field unknown, of a wrong type, or out of bounds.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in kinds:
                raise PlanError(
                    f"plan has the unknown field {key!r}; allowed: {', '.join(sorted(kinds))}"
                )
            if value is not None and key != "optimizer":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise PlanError(f"plan: {key}={value!r} must be a number")
                value = float(value) if "float" in kinds[key] else value
            clean[key] = value
        return cls(**clean)


@dataclass(frozen=True, kw_only=True)
class ClientJob:
    """One client's training in one round.

    Attributes:
        client: the client's stable name.
        run: name of the run.
        round: number of the round, from 1.
        adapter: where training starts.
        data: the client's examples, or where they are.
        plan: how to train.
        privacy: DP-SGD settings; None trains without privacy.
        seed: root seed of the run.
        assignment: which tensors train, are sent and are kept.
        codec: how the values that are sent travel, as a recipe writes its piece.
        beside: frozen adapters that are applied beside the trained one.
        memory: folder of what the client keeps from round to round; None keeps nothing.
        secure: how its numbers enter a secure sum (``aggregation.secret_ring.Ring.to_mapping``):
            the update then stays on the desk of the trainer; empty to give it out.
    """

    client: str
    run: str
    round: int
    adapter: Adapter
    data: Examples | DataSource
    plan: TrainingPlan
    privacy: LocalPrivacy | None = None
    seed: int = 0
    assignment: Assignment = field(default_factory=Assignment)
    codec: str = "float32"
    beside: tuple[Adapter, ...] = ()
    memory: Path | None = None
    secure: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose examples are measured, and with what of their own.

    Attributes:
        client: the client's stable name.
        run: name of the run.
        round: number of the last round that counts.
        assignment: as in the training; says what the client keeps, and its held-out share.
        memory: folder of what the client keeps; None if it keeps nothing.
    """

    client: str
    run: str
    round: int
    assignment: Assignment = field(default_factory=Assignment)
    memory: Path | None = None


def shuffled_batches(examples: int, plan: TrainingPlan, order: Stream) -> Iterator[Indices]:
    """The batches of one round without privacy: shuffled passes, every batch of the same size."""
    size = min(examples, max(1, round(plan.rate(examples) * examples)))
    waiting = np.empty(0, np.int64)
    for _ in range(plan.steps_per_round(examples)):
        while waiting.size < size:
            waiting = np.concatenate([waiting, order.permutation(examples)])
        batch, waiting = waiting[:size], waiting[size:]
        yield np.sort(batch)


def parts(
    batch: Indices, lengths: Sequence[int], tokens: int = PART_TOKENS, rows: int | None = None
) -> list[Indices]:
    """Split a batch into parts of texts of similar length, each of at most so many padded tokens.

    Args:
        batch: indices of examples.
        lengths: number of tokens of every example.
        tokens: bound on (texts in the part) x (longest text in the part).
        rows: bound on the texts in a part; None for no other bound.

    Returns:
        the parts, shortest texts first; none for an empty batch.
    """
    ordered = sorted(batch.tolist(), key=lambda i: (lengths[i], i))
    out: list[list[int]] = []
    for index in ordered:
        # The newest text is the longest one, so it sets the width of its part.
        if not out or len(out[-1]) == rows or (len(out[-1]) + 1) * lengths[index] > tokens:
            out.append([])
        out[-1].append(index)
    return [np.array(part, np.int64) for part in out]


def check_finite(adapter: Adapter) -> None:
    """Refuse what a training that diverged has left.

    Raises:
        PlanError: if a value is NaN or infinite.
    """
    if not adapter.is_finite():
        raise PlanError("training diverged to values that are not finite: lower learning_rate")


def _within(name: str, value: float, above: float, most: float) -> None:
    if not (math.isfinite(value) and above < value <= most):
        raise PlanError(f"plan: {name}={value} must be above {above} and at most {most}")


def _whole(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise PlanError(f"plan: {name}={value!r} must be a whole number in {least}..{most}")
