"""The weigh piece: how much one client counts in the mean.

A choice gives each update a *weight*, by which all weights of a round are divided, and a
*discount*, which only shrinks the update's own contribution: with base weights w_k and discounts
d_k the mean change is ``sum_k d_k w_k x_k / sum_k w_k``.

    >>> str(ByExamples()), str(Uniform()), str(Staleness(exponent=1.0))
    ('examples', 'uniform', 'staleness(exponent=1)')
    >>> Staleness().discount(3)
    0.5
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aggregation.errors import RecipeError
from aggregation.low_rank import LowRank
from aggregation.piece import Piece
from aggregation.update import Update

MAX_STALENESS = 1000


class Weigh(Piece):
    """Base of the choices. By default a weight is the update's own, and nothing is discounted."""

    @property
    def equal(self) -> bool:
        """Whether all clients have the same weight: client-level privacy is accounted for that."""
        return False

    @property
    def measured(self) -> bool:
        """Whether the weight comes out of the update's values, unknown to who does not see them."""
        return False

    @property
    def max_staleness(self) -> int | None:
        """How many versions behind an update may be; None for any that has a known start."""
        return None

    def weight(self, update: Update) -> float:
        """The weight in the mean, before normalising; 0 or more."""
        return update.weight

    def discount(self, behind: int) -> float:
        """What the contribution is multiplied by; above 0 and at most 1.

        Args:
            behind: versions that were closed since the update's start was handed out.
        """
        return 1.0


@dataclass(frozen=True)
class ByExamples(Weigh):
    """Weigh: by the update's own weight, usually its number of examples (McMahan et al. 2017)."""

    kind = "examples"


@dataclass(frozen=True)
class Uniform(Weigh):
    """Weigh: every client the same."""

    kind = "uniform"

    @property
    def equal(self) -> bool:
        """They have."""
        return True

    def weight(self, update: Update) -> float:
        """1, whatever the client says."""
        return 1.0


@dataclass(frozen=True)
class Frobenius(Weigh):
    """Weigh: by the size of what the client hands in, ``||s_k B_k A_k||_F`` over all its modules.

    HetLoRA (2401.06432, section 3.2), "sparsity-weighted aggregation": p_k is the norm divided by
    the sum of all norms, so that clients whose tail ranks carry nothing count less. The norm comes
    from the inner products of the factors. Ours is of the *scaled* product, since alpha / r differs
    between ranks; where alpha grows with the rank the two agree. The number of examples plays no
    part, and the tensors outside the modules have the same weights.

    Weights are known only once the updates are, and a client that inflates its factors inflates
    its own weight: combine it with nothing that has to trust weights.
    """

    kind = "frobenius"

    @property
    def measured(self) -> bool:
        """It does."""
        return True

    def weight(self, update: Update) -> float:
        """The norm; 0 if every product is zero, and then the client has no say."""
        modules = update.adapter.spec.modules
        return math.hypot(*(LowRank.of(update.adapter, m.name).norm() for m in modules))


@dataclass(frozen=True)
class Staleness(Weigh):
    """Weigh: by examples, and an update that is tau versions late contributes (1 + tau)^-a of it.

    FedBuff (Nguyen et al. 2022, 2106.06639), section 5.1: a = 1/2, and the sum is divided by the
    number of updates whatever their discounts are, so late ones make the step shorter instead of
    being made up for. There all clients count the same: that is ``equal=true``; by default ours
    weighs by examples, as every other recipe here does.

    Attributes:
        exponent: a; 0 counts late updates in full.
        max_staleness: an update that is further behind is refused, and the server keeps the
            starts of so many versions.
        equal: whether all clients have the same weight, as published.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "staleness"
    exponent: float = 0.5
    max_staleness: int = 10
    equal: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.exponent) and 0 <= self.exponent <= 10):
            raise RecipeError(
                f"staleness: exponent={self.exponent} must lie in 0..10; usual is 0.5"
            )
        if not 0 <= self.max_staleness <= MAX_STALENESS:
            raise RecipeError(
                f"staleness: max_staleness={self.max_staleness} must lie in 0..{MAX_STALENESS}"
            )

    def weight(self, update: Update) -> float:
        """The update's own weight, or 1."""
        return 1.0 if self.equal else update.weight

    def discount(self, behind: int) -> float:
        """(1 + tau)^-a."""
        return float((1.0 + max(0, behind)) ** -self.exponent)
