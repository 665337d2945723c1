"""What a mechanism did, as a value that any accountant can read.

    >>> event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=20, max_grad_norm=1.0)
    >>> SgdEvent.from_mapping(event.to_mapping()) == event
    True

An event holds public facts only: nothing in it depends on the content of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from privacy.budget import BudgetError, Unit

KIND = "poisson-gaussian-sgd"
COHORT_KIND = "gaussian-cohort"
LARGEST = 1e15  # of any number in an event that somebody else wrote
MECHANISMS = ("gaussian", "tree", "distributed")


@dataclass(frozen=True, kw_only=True)
class SgdEvent:
    """Some steps of DP-SGD with Poisson sampling (Abadi et al. 2016, algorithm 1).

    Each step draws every example with probability ``sample_rate`` on its own, clips its gradient
    to ``max_grad_norm``, sums, and adds Gaussian noise of standard deviation ``noise_multiplier *
    max_grad_norm``. Neighbouring data sets differ by adding or removing one example.

    Attributes:
        noise_multiplier: at least 0; 0 gives no privacy at all.
        sample_rate: above 0, at most 1.
        steps: how many steps, empty batches included; at least 1.
        max_grad_norm: the clipping norm; above 0.

    Raises:
        BudgetError: if a value is out of its bounds.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    unit: ClassVar[Unit] = Unit.EXAMPLE

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.sample_rate, "a batch cannot be larger than the data")
        if type(self.steps) is not int or self.steps < 1:
            raise BudgetError(f"steps={self.steps!r} must be a whole number of at least 1")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise BudgetError(f"max_grad_norm={self.max_grad_norm} must be above 0")

    def to_mapping(self) -> dict[str, int | float | str]:
        """Plain values, as they travel in ``Update.privacy_event`` and stand in a ledger."""
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_mapping`.

        Raises:
            BudgetError: on a field missing or unknown, or of a wrong type or value.
        """
        _numbers(values, KIND, [field.name for field in fields(cls)])
        return cls(
            noise_multiplier=float(values["noise_multiplier"]),
            sample_rate=float(values["sample_rate"]),
            steps=values["steps"],
            max_grad_norm=float(values["max_grad_norm"]),
        )


@dataclass(frozen=True, kw_only=True)
class CohortEvent:
    """One round of noise on the sum of a cohort's clipped updates; the unit is a whole client.

    Each client that takes part moves the sum by at most ``clip``, and the noise has standard
    deviation ``noise_multiplier`` times the most that one client can move what is released.
    Neighbouring sets of clients differ by adding or removing one.

    Attributes:
        noise_multiplier: above 0: standard deviation over sensitivity. Of ``tree`` it is that of
            the whole tree, in all the rounds that a client may take part in; of ``distributed``
            that of the Gaussian that costs as much as the shares that are counted on.
        sample_rate: probability with which each client is drawn on its own; 1 where cohorts are
            drawn in any other way.
        steps: 1, or 0 for a further round of a tree that was counted with its first one.
        clip: Euclidean norm to which an update is clipped; above 0.
        mechanism: ``gaussian``, every round on its own; ``tree``; or ``distributed``, noise in
            shares that the clients add, every round on its own.

    Raises:
        BudgetError: if a value is out of its bounds.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: float
    mechanism: str = "gaussian"
    unit: ClassVar[Unit] = Unit.CLIENT

    def __post_init__(self) -> None:
        _check(self.noise_multiplier, self.sample_rate, "it is a probability")
        if self.mechanism not in MECHANISMS:
            raise BudgetError(f"mechanism={self.mechanism!r} is not {' or '.join(MECHANISMS)}")
        least = 0 if self.mechanism == "tree" else 1
        if type(self.steps) is not int or self.steps < least:
            raise BudgetError(f"steps={self.steps!r} must be a whole number of at least {least}")
        if self.mechanism != "gaussian" and self.sample_rate != 1:
            raise BudgetError(
                f"sample_rate={self.sample_rate} must be 1: mechanism={self.mechanism!r} earns "
                "nothing by sampling"
            )
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise BudgetError(f"clip={self.clip} must be above 0")

    def to_mapping(self) -> dict[str, int | float | str]:
        """Plain values, as they stand in a ledger and in the record of a round."""
        return {"kind": COHORT_KIND, **asdict(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_mapping`.

        Raises:
            BudgetError: on a field missing or unknown, or of a wrong type or value.
        """
        _numbers(values, COHORT_KIND, [field.name for field in fields(cls)], words=("mechanism",))
        return cls(
            noise_multiplier=float(values["noise_multiplier"]),
            sample_rate=float(values["sample_rate"]),
            steps=values["steps"],
            clip=float(values["clip"]),
            mechanism=str(values["mechanism"]),
        )


Event = SgdEvent | CohortEvent


def read_event(values: Mapping[str, Any]) -> Event:
    """An event of either kind, as ``to_mapping`` wrote it.

    Raises:
        BudgetError: if it is neither.
    """
    if values.get("kind") == COHORT_KIND:
        return CohortEvent.from_mapping(values)
    return SgdEvent.from_mapping(values)


def _check(noise_multiplier: float, sample_rate: float, why: str) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise BudgetError(f"noise_multiplier={noise_multiplier} must be at least 0")
    if not 0 < sample_rate <= 1:
        raise BudgetError(f"sample_rate={sample_rate} must be above 0 and at most 1: {why}")


def _numbers(
    values: Mapping[str, Any], kind: str, names: Sequence[str], words: Sequence[str] = ()
) -> None:
    if set(values) != {"kind", *names} or values["kind"] != kind:
        raise BudgetError(
            f"a privacy event has kind={kind!r} and exactly the fields {', '.join(names)}"
        )
    for name in names:
        number = isinstance(values[name], int | float) and not isinstance(values[name], bool)
        if name in words:
            continue
        if not number or not abs(values[name]) <= LARGEST:
            said = str(values[name])[:40]
            raise BudgetError(f"privacy event: {name}={said} is not a number up to {LARGEST:g}")
