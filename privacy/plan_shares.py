"""What noise in shares means for a plan: how much each client adds, and how much a sum has.

>>> shares = Shares(clients=12)
>>> shares.least, shares.honest
(8, 6)
>>> round(shares.one(0.9), 3), round(shares.most(0.9), 3)
(0.367, 1.273)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aggregation.secure_pieces import counted_on
from privacy.budget import BudgetError


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A cohort whose clients add the noise.

    Attributes:
        clients: how many a round asks; at least 3.
        dropouts: share of them that may drop out, below a third.
        corrupt: share of them that may tell the server their noise, below a third.

    Raises:
        BudgetError: if nobody would be left to count on.
    """

    clients: int
    dropouts: float = 0.3
    corrupt: float = 0.1

    def __post_init__(self) -> None:
        for option, value in (("--dropouts", self.dropouts), ("--corrupt", self.corrupt)):
            if not 0 <= value < 1 / 3:
                raise BudgetError(f"{option} {value:g} must lie in 0..1/3 (excluded)")
        if self.clients < 3 or self.honest < 1:
            raise BudgetError(
                f"--clients {self.clients}: of so few, {self.honest} are left to count on; have at "
                "least 3, and more if many may drop out or be in league with the server"
            )

    @property
    def least(self) -> int:
        """The fewest clients in a sum."""
        return counted_on(self.clients, self.dropouts, self.corrupt)[0]

    @property
    def honest(self) -> int:
        """Those of them whose noise is counted on."""
        return counted_on(self.clients, self.dropouts, self.corrupt)[1]

    def one(self, noise: float) -> float:
        """The noise that one client adds, over the clip, if so much is counted on."""
        return noise / math.sqrt(self.honest)

    def most(self, noise: float) -> float:
        """The noise of a sum of all clients, over the clip."""
        return self.one(noise) * math.sqrt(self.clients)

    def document(self, noise: float) -> dict[str, Any]:
        """The same for programs."""
        return {
            "clients": self.clients,
            "dropouts": self.dropouts,
            "corrupt": self.corrupt,
            "least_in_a_sum": self.least,
            "counted_on": self.honest,
            "noise_of_one": self.one(noise),
            "noise_of_all": self.most(noise),
        }

    def lines(self, noise: float) -> Iterator[str]:
        """The same for people."""
        yield f"each client adds  {self.one(noise):.4f} times the clip, before a secure sum"
        yield (
            f"counted on        {self.honest} of {self.clients} clients, where at least "
            f"{self.least} are in a sum and {self.least - self.honest} may be in league with the "
            "server"
        )
        yield f"noise of a sum    up to {self.most(noise):.4f} times the clip, if all come"
