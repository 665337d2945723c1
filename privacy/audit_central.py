"""Canaries for noise on the aggregate: clients whose whole update points where the audit wants.

    event = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=100, max_grad_norm=clip)
    canaries = Canaries(5000, event, key)
    audit(NoisySums(open_round), canaries, size=25_346, denominator=50.0)
    result = judge(canaries, claimed=8.0, delta=1e-5, mechanism="central")

An event's steps are rounds here, and its rate is that with which every client is drawn in a round.
:class:`NoisySums` is the very sum that a run's server makes; anything else that releases a mean of
vectors can be audited in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aggregation.clipped_sum import VectorSum
from privacy.audit_bound import AuditError
from privacy.audit_canaries import Canaries

Vector = npt.NDArray[np.floating]


class Central(Protocol):
    """What is audited: a round of clients' vectors in, a noisy mean out."""

    def release(self, vectors: Iterable[Vector]) -> Vector:
        """The noisy mean of these vectors, each of shape (d,); perhaps of none."""
        ...


@dataclass
class NoisySums:
    """Rounds of clipped sums with noise, one after the other.

    Attributes:
        open: by number of the round, from 1: a new sum, such as a private piece opens it.
        rounds: how many were released.
    """

    open: Callable[[int], VectorSum]
    rounds: int = field(init=False, default=0)

    def release(self, vectors: Iterable[Vector]) -> Vector:
        """The noisy mean of a round: every vector clipped, the sum noised and divided."""
        self.rounds += 1
        total = self.open(self.rounds)
        for vector in vectors:
            total.add(vector)
        return total.mean()[0]


def audit(
    mechanism: Central,
    canaries: Canaries,
    *,
    size: int,
    denominator: float,
    others: Callable[[int], Iterable[Vector]] = lambda _: (),
) -> None:
    """Run every round of the event once, with the canaries among the clients, and score them.

    Args:
        mechanism: what is audited.
        canaries: for the event of the whole run; scored when this returns.
        size: d, length of a vector.
        denominator: by which the mechanism divides its sum.
        others: by number of the round, from 1: the vectors of the other clients that it draws.
            They are best without a direction in common, which would cover the canaries.

    Raises:
        AuditError: if the mechanism returns something of another shape, or there are more
            canaries than numbers in a vector.
    """
    canaries.point(np.ones(size, np.bool_))
    for number in range(1, canaries.event.steps + 1):
        mean = np.asarray(mechanism.release(_clients(canaries, others(number))))
        if mean.shape != (size,):
            raise AuditError(
                f"the mechanism returned shape {mean.shape} for vectors of {size} numbers: give "
                "the size of what it returns"
            )
        canaries.see(mean * denominator)


def _clients(canaries: Canaries, rest: Iterable[Vector]) -> Iterator[Vector]:
    for block in canaries.blocks(canaries.draw()):
        yield from canaries.vectors(block)
    yield from rest
