"""A correction of B for what the mean of the factors misses: LoRA-FAIR, in ridge form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aggregation.errors import RecipeError
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Piece
from aggregation.reducing import Reduced
from aggregation.refactoring import Refactored, mean_factors, measured
from aggregation.state import GlobalState


@dataclass(frozen=True)
class Ridge(Piece):
    """Refactor: the means of the factors, and B moved so that their product misses less.

    LoRA-FAIR (2411.14961, equation 8) looks for the dB that brings ``s (B + dB) A`` closest to the
    exact mean, by cosine similarity, with ``lambda ||dB||`` as a price and by gradient descent. In
    its place we minimise ``||E - s dB A||_F^2 + lambda ||dB||_F^2`` with E the exact mean minus
    ``s B A``, which has the solution

        dB = s E A^T (s^2 A A^T + lambda I)^-1,

    from the stacked factors of E, so nothing dense is made and nothing is iterated. It differs from
    the paper in the measure (a distance has a size, a cosine has none) and in being the minimum.
    The error never grows: at dB = 0 the objective is the old error. But only its part inside the
    row space of A can be repaired; the rest stays, and neither form is exact.

    Attributes:
        strength: lambda (0.01 in the paper, in its own measure); towards 0 all is repaired that
            can be.

    Raises:
        RecipeError: if it is not positive and finite.
    """

    strength: float = 0.01
    kind = "ridge"
    beside = False
    turns = False
    needs_products = True
    down = "r D"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise RecipeError(
                f"ridge: strength={self.strength} must be positive and finite; usual is 0.01, and "
                "refactor=keep corrects nothing"
            )

    def _correction(self, missed: LowRank, right: Array, scale: float) -> Array:
        """dB, from the SVD of A: rows that depend on each other are no division by nothing."""
        turn, sizes, rows = np.linalg.svd(right, full_matrices=False)
        kept = sizes > np.finfo(np.float64).eps * max(right.shape) * sizes[:1].sum()
        filtered = np.where(kept, scale * sizes, 0.0) / (scale**2 * sizes**2 + self.strength)
        onto = missed.B @ (missed.A @ rows.T)
        return np.asarray(onto * filtered @ turn.T)

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Correct the mean B of every module.

        Raises:
            RecipeError: if the change is of products alone.
        """
        factors, modules = {}, {}
        for module in state.adapter.spec.modules:
            name, scale = module.name, state.adapter.spec.scale(module.name)
            mean = mean_factors(state, change, name)
            if mean is None:
                raise RecipeError("Ridge needs a mean of factors; choose reduce=FactorMean()")
            left, right = mean
            exact = state.exact(name) + change.products[name]
            missed = exact - LowRank(left * scale, right)
            factors[name] = (left + self._correction(missed, right, scale), right)
            modules[name] = measured(state, change, name, factors[name])
        return Refactored(factors, dict(state.residual), modules)
