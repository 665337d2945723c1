"""The optimise piece: what the server does with the mean change.

>>> str(Sgd())
'sgd'
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aggregation.errors import RecipeError
from aggregation.piece import Piece
from aggregation.reducing import Reduced


@dataclass(frozen=True)
class Sgd(Piece):
    """Optimise: add the mean change, times a server learning rate (Reddi et al. 2021, alg. 1).

    Attributes:
        learning_rate: eta; 1 is plain averaging.

    Raises:
        RecipeError: if it is not a positive finite number.
    """

    learning_rate: float = 1.0
    kind = "sgd"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RecipeError(
                f"server learning_rate={self.learning_rate} must be positive and finite; "
                "1 is plain averaging"
            )

    def step(self, reduced: Reduced) -> Reduced:
        """The change to apply."""
        eta = self.learning_rate
        if eta == 1.0:
            return reduced
        factors = None
        if reduced.factors is not None:
            factors = {n: (eta * left, eta * right) for n, (left, right) in reduced.factors.items()}
        return Reduced(
            {name: product * eta for name, product in reduced.products.items()},
            factors,
            {key: eta * value for key, value in reduced.others.items()},
        )


Optimise = Sgd
