"""Canaries for noise on the aggregate: clients whose whole update points where the audit wants.

    event = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=100, max_grad_norm=clip)
    canaries = Canaries(5000, event, key)
    audit(mechanism, canaries, size=25_346, denominator=50.0)
    result = judge(canaries, claimed=8.0, delta=1e-5, mechanism="central")

An event's steps are rounds here, and its rate is that with which every client is drawn in a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from privacy.audit_bound import AuditError
from privacy.audit_canaries import Canaries

Vector = npt.NDArray[np.floating]


class Central(Protocol):
    """What is audited: a round of clients' vectors in, a noisy mean out."""

    def release(self, vectors: Iterable[Vector]) -> Vector:
        """The noisy mean of these vectors, each of shape (d,); perhaps of none."""
        ...


def audit(
    mechanism: Central,
    canaries: Canaries,
    *,
    size: int,
    denominator: float,
    others: Sequence[Iterable[Vector]] = (),
) -> None:
    """Run every round of the event once, with the canaries among the clients, and score them.

    Args:
        mechanism: what is audited.
        canaries: for the event of the whole run; scored when this returns.
        size: d, length of a vector.
        denominator: by which the mechanism divides its sum.
        others: for each round, the vectors of the other clients that it draws; they are best
            without a direction in common, which would cover the canaries. Fewer rounds than the
            event has means none in the others.

    Raises:
        AuditError: if the mechanism returns something of another shape, or there are more
            canaries than numbers in a vector.
    """
    canaries.point(np.ones(size, np.bool_))
    for number in range(canaries.event.steps):
        rest = others[number] if number < len(others) else ()
        mean = np.asarray(mechanism.release(_clients(canaries, rest)))
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
