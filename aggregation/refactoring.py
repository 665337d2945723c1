"""The refactor piece: from the exact update back to trainable factors of the global rank.

* :class:`Svd`: the best factors of that rank (Eckart and Young 1936), in SVD order, A with
  orthonormal rows and B carrying the singular values, as in FedSVD (2505.12805, section 3). What
  does not fit stays on the server as a low-rank residual and re-enters the next round.
* :class:`Keep`: the factors are moved by their mean change and never mixed (a fixed gauge).

Those that keep the rest *beside* the adapter are in :mod:`aggregation.folding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from aggregation.errors import RecipeError
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Piece
from aggregation.reducing import Factors, Reduced
from aggregation.report import ModuleReport
from aggregation.state import GlobalState


@dataclass(frozen=True, eq=False)
class Refactored:
    """New factors.

    Attributes:
        factors: by module, (B, A) without the scale, float64, at the global rank.
        residual: by module, what the factors leave out and the server keeps.
        modules: by module, the measurement for the report.
    """

    factors: Mapping[str, Factors]
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    modules: Mapping[str, ModuleReport] = field(default_factory=dict)


@dataclass(frozen=True)
class Svd(Piece):
    """Refactor: truncated SVD with a residual that stays on the server.

    Attributes:
        residual_rank: most singular directions that the residual keeps per module; memory and
            checkpoint grow with it, never with the number of clients.
        energy: share of the squared norm to keep, with the smallest rank that does (FLoRIST,
            2506.09199, section 3); None keeps all that the global rank can hold.

    Raises:
        RecipeError: if either is out of range.
    """

    residual_rank: int = 64
    energy: float | None = None
    kind = "svd"
    beside = False

    def __post_init__(self) -> None:
        if self.residual_rank < 0:
            raise RecipeError(
                f"residual_rank={self.residual_rank} must be 0 (drop the residual) or more"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy={self.energy} must be above 0 and at most 1; usual is 0.9")

    @property
    def down(self) -> str:
        """Numbers per module that a client gets, in words."""
        return "r D" if self.energy is None else "r D, rank p <= r"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Split the exact new update of every module into factors and residual."""
        spec = state.adapter.spec
        factors, residual, modules = {}, {}, {}
        for module in spec.modules:
            exact = state.exact(module.name) + change.products[module.name]
            left, values, right = exact.svd()
            kept = module.rank if self.energy is None else enough(values, self.energy)
            kept = min(module.rank, kept)
            rank = min(kept, significant(values, exact.shape))
            stop = min(len(values), kept + self.residual_rank)
            factors[module.name] = pad(
                left[:, :rank] * (values[:rank] / spec.scale(module.name)),
                right[:rank],
                module.rank,
            )
            tail = slice(kept, max(stop, kept))
            residual[module.name] = LowRank(left[:, tail] * values[tail], right[tail])
            modules[module.name] = ModuleReport(
                rank,
                significant(values, exact.shape),
                float(np.linalg.norm(values)),
                float(np.linalg.norm(values[kept:])),
                float(np.linalg.norm(values[stop:])),
            )
        return Refactored(factors, residual, modules)


@dataclass(frozen=True)
class Keep(Piece):
    """Refactor: none; the global factors move by their mean change."""

    kind = "keep"
    beside = False
    down = "r D"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Move the factors, and measure against the exact products where those are known."""
        if change.factors is None:
            raise RecipeError("Keep needs a mean of factors; choose refactor=Svd()")
        factors, modules = {}, {}
        for name, (move_left, move_right) in change.factors.items():
            left, right = state.adapter.factors(name)
            factors[name] = (left + move_left, right + move_right)
            if name in change.products:
                exact = state.exact(name) + change.products[name]
                scale = state.adapter.spec.scale(name)
                handed = LowRank(factors[name][0] * scale, factors[name][1])
                distance = (exact - handed).norm()
                bound = min(exact.rank, *exact.shape)
                modules[name] = ModuleReport(handed.rank, bound, exact.norm(), distance, distance)
        return Refactored(factors, dict(state.residual), modules)


def enough(values: Array, energy: float | None) -> int:
    """The smallest number of leading singular values that hold a share of the squared norm."""
    if energy is None or not len(values):
        return len(values)
    shares = np.cumsum(values**2)
    return min(len(values), int(np.sum(shares < energy * shares[-1])) + 1)


def significant(values: Array, shape: tuple[int, int]) -> int:
    """How many singular values are more than rounding: above eps * max(shape) * the largest."""
    if not len(values):
        return 0
    floor = np.finfo(np.float64).eps * max(shape) * values[0]
    return int(np.sum(values > floor))


def pad(left: Array, right: Array, rank: int) -> Factors:
    """Fill factors up to a rank without changing their product.

    New columns of B are zero; new rows of A are orthonormal and orthogonal to the others, the same
    ones every time. (With zero rows as well, no gradient would ever reach them.)

    Args:
        left: B of shape (d_out, k).
        right: A of shape (k, d_in).
        rank: the rank wanted; k or more, at most d_in.
    """
    missing = rank - left.shape[1]
    if missing <= 0:
        return left, right
    d_in = right.shape[1]
    draw = np.random.Generator(np.random.PCG64(d_in)).standard_normal((d_in, missing))
    basis = np.linalg.qr(right.T)[0] if len(right) else np.zeros((d_in, 0))
    for _ in range(2):  # once more for the digits that the first subtraction cancels
        draw -= basis @ (basis.T @ draw)
    rows = np.linalg.qr(draw)[0].T
    return np.hstack([left, np.zeros((left.shape[0], missing))]), np.vstack([right, rows])
