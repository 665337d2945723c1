"""How much may be spent, on what unit, and by which local mechanism.

>>> PrivacyBudget(8.0, 1e-5).unit
<Unit.EXAMPLE: 'example'>
>>> LocalPrivacy(epsilon=8.0, delta=1e-5, rounds=5).max_grad_norm
1.0
    >>> LocalPrivacy(epsilon=-1.0, delta=1e-5)
    Traceback (most recent call last):
    privacy.budget.BudgetError: epsilon=-1.0 must be above 0; usual values are 1 to 10
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from privacy.errors import PrivacyError


class BudgetError(PrivacyError):
    """A budget or a mechanism that makes no sense; the message says what is allowed."""


class BudgetExceeded(BudgetError):  # noqa: N818 - says what happened
    """The next step would overspend. Nothing was spent, and nothing may be trained."""


class Unit(StrEnum):
    """What two neighbouring data sets differ in, by adding or removing one of it."""

    EXAMPLE = "example"  # one row of one client
    CLIENT = "client"  # everything of one client


class Accountant(StrEnum):
    """How events are composed into an epsilon."""

    RDP = "rdp"  # Renyi divergences (Mironov 2017): a safe bound, some 12 % above the tight one
    PLD = "pld"  # privacy loss distributions (Koskela et al. 2020): tight, and slow


@dataclass(frozen=True)
class PrivacyBudget:
    """What may be spent at most, over all runs.

    Attributes:
        epsilon: upper bound of epsilon; above 0.
        delta: the delta that goes with it; above 0 and below 1.
        unit: what is protected.

    Raises:
        BudgetError: if a value is out of its bounds.
    """

    epsilon: float
    delta: float
    unit: Unit = Unit.EXAMPLE

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        object.__setattr__(self, "unit", Unit(self.unit))


@dataclass(frozen=True, kw_only=True)
class LocalPrivacy:
    """What a run asks of each client: DP-SGD on its own examples (Abadi et al. 2016).

    Give ``epsilon`` for the whole run, and each client calibrates its noise to its own number of
    examples; or give ``noise_multiplier``, and epsilon is what comes out.

    Attributes:
        delta: at most 1 / n for a client of n examples.
        epsilon: to be reached after ``rounds`` rounds, or None.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``, or None.
        max_grad_norm: Euclidean norm to which each example's gradient is clipped.
        rounds: in how many rounds a client takes part at most; the budget covers them all.
        accountant: how epsilon is computed, both for calibrating and for reporting.

    Raises:
        BudgetError: if a value is out of its bounds or two contradict each other.
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    rounds: int = 1
    accountant: Accountant = Accountant.RDP

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        sigma = self.noise_multiplier
        if sigma is not None and not (math.isfinite(sigma) and sigma >= 0):
            raise BudgetError(f"noise_multiplier={sigma} must be a number of at least 0")
        if sigma == 0 and self.epsilon is not None:
            raise BudgetError(
                f"noise_multiplier={sigma} gives no privacy, but epsilon={self.epsilon} is asked "
                "for: leave noise_multiplier out and it is calibrated, or leave epsilon out"
            )
        if sigma is None and self.epsilon is None:
            raise BudgetError("give epsilon, or noise_multiplier, or both")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise BudgetError(f"max_grad_norm={self.max_grad_norm} must be above 0")
        if type(self.rounds) is not int or self.rounds < 1:
            raise BudgetError(f"rounds={self.rounds!r} must be a whole number of at least 1")
        object.__setattr__(self, "accountant", check_accountant(self.accountant))

    def budget(self) -> PrivacyBudget | None:
        """What a client's ledger may reach, or None if only the noise is prescribed."""
        return None if self.epsilon is None else PrivacyBudget(self.epsilon, self.delta)

    def check_examples(self, examples: int) -> None:
        """Refuse a delta with which giving away one whole example would count as private.

        Raises:
            BudgetError: if delta is above 1 / examples.
        """
        if self.delta * examples > 1:
            raise BudgetError(
                f"delta={self.delta} is above 1/n = {1 / examples:.3g} for n = {examples} "
                f"examples, so publishing a whole example would pass for private: choose "
                f"{0.1 / examples:.1g} or less"
            )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a message or a file; fields that are None are left out."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        values["accountant"] = self.accountant.value
        return values

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LocalPrivacy:
        """The inverse of :meth:`to_mapping`; whole numbers may stand for fractions.

        Raises:
            BudgetError: on a field unknown, missing, of a wrong type, or out of bounds.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise BudgetError(
                f"privacy has the unknown field {unknown[0]!r}; allowed: {', '.join(sorted(known))}"
            )
        if "delta" not in values:
            raise BudgetError("privacy needs delta; a good choice is 0.1 / n for n examples")
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in ("accountant", "rounds") and value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise BudgetError(f"privacy field {key!r} must be a number, got {value!r}")
                value = float(value)
            clean[key] = value
        return cls(**clean)


def check_accountant(value: str) -> Accountant:
    """The accountant of this name.

    Raises:
        BudgetError: if there is none.
    """
    try:
        return Accountant(value)
    except ValueError:
        raise BudgetError(
            f"accountant={value!r} is not one of {', '.join(Accountant)} "
            "(gdp is not offered: it under-states epsilon)"
        ) from None


def check_epsilon(value: float) -> None:
    """Refuse an epsilon that is not a positive number.

    Raises:
        BudgetError: saying what is usual.
    """
    if not (math.isfinite(value) and value > 0):
        raise BudgetError(f"epsilon={value} must be above 0; usual values are 1 to 10")


def check_delta(value: float) -> None:
    """Refuse a delta that is no probability, or is certain.

    Raises:
        BudgetError: saying what is allowed.
    """
    if not 0 < value < 1:
        raise BudgetError(f"delta={value} must be above 0 and below 1, and at most 1/n")


def check_noise(value: float) -> None:
    """Refuse noise that protects nothing, where protection is asked for.

    Raises:
        BudgetError: saying what to give instead.
    """
    if not (math.isfinite(value) and value > 0):
        raise BudgetError(
            f"noise_multiplier={value} adds no noise, and without noise there is no epsilon: give "
            "epsilon instead and the noise is calibrated to it, or train without privacy"
        )
