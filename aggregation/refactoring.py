"""The refactor piece: from the mean change back to trainable factors of the global rank.

* :class:`Svd`: the best factors of that rank (Eckart and Young 1936), in SVD order. What does not
  fit stays on the server as a low-rank residual and re-enters the next round.
* :class:`Keep`: the factors are moved by their mean change and never mixed (a fixed gauge).

Those that keep the rest *beside* the adapter are in :mod:`aggregation.folding`, a correction of B
in :mod:`aggregation.ridge`. Each says of itself whether it ``turns`` the gauge, whether it
``needs_products`` even where the reduce is a mean of factors, and whether it keeps a part
``beside`` the adapter.
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

_SHARE_OF_A = {"B": 0.0, "A": 1.0, "sqrt": 0.5}  # exponent of the singular values in A


@dataclass(frozen=True, eq=False)
class Refactored:
    """New factors.

    Attributes:
        factors: by module, (B, A) without the scale, float64, at the global rank.
        residual: by module, what the factors leave out and the server keeps.
        modules: by module, the measurement for the report.
        transport: by module, the (r, r) matrix G of B' = B G, A' = G^-1 A from the factors as they
            would be without the refactoring; none where the gauge stays, or nothing lives in it.
    """

    factors: Mapping[str, Factors]
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    modules: Mapping[str, ModuleReport] = field(default_factory=dict)
    transport: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Svd(Piece):
    """Refactor: truncated SVD with a residual that stays on the server.

    After a reduce in product space it splits the exact new update. After a mean of factors of which
    clients trained only B, it turns the new B A into factors that are the same product with an
    orthonormal A, as FedSVD (2505.12805, section 3 and algorithm 1): lossless, since the rank is r,
    and with no effect on privacy, since it looks at nothing but the result. Where we differ: the
    SVD is that of the triangular factors of B and A, and no d_out x d_in matrix is made; a
    direction that nothing was learnt in keeps a row of A, in the row space of the old A, so
    that buffers can be transported without loss and no part of A dies.

    Attributes:
        residual_rank: most singular directions that the residual keeps per module; memory and
            checkpoint grow with it, never with the number of clients.
        energy: share of the squared norm to keep, with the smallest rank that does (FLoRIST,
            2506.09199, section 3); None keeps all that the global rank can hold.
        balance: the factor that carries the singular values, the other one being orthonormal:
            ``B`` (FedSVD), ``A``, or ``sqrt`` for the root of them in each (FedASK, 2507.09990,
            algorithm 1). Directions without content have a zero column of B and an orthonormal row
            of A in all three.

    Raises:
        RecipeError: if a setting is out of range.
    """

    residual_rank: int = 64
    energy: float | None = None
    balance: str = "B"
    kind = "svd"
    beside = False
    turns = True  # the next factors are in another gauge than the last ones
    needs_products = False

    def __post_init__(self) -> None:
        if self.residual_rank < 0:
            raise RecipeError(
                f"residual_rank={self.residual_rank} must be 0 (drop the residual) or more"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy={self.energy} must be above 0 and at most 1; usual is 0.9")
        named = {name.lower(): name for name in _SHARE_OF_A}
        if self.balance.lower() not in named:
            raise RecipeError(f"svd: balance={self.balance!r} is not one of B, A, sqrt")
        object.__setattr__(self, "balance", named[self.balance.lower()])

    @property
    def down(self) -> str:
        """Numbers per module that a client gets, in words."""
        return "r D" if self.energy is None else "r D, rank p <= r"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Split the new update of every module into factors and residual."""
        factors, residual, modules, transport = {}, {}, {}, {}
        for module in state.adapter.spec.modules:
            name, scale = module.name, state.adapter.spec.scale(module.name)
            mean = mean_factors(state, change, name)
            if mean is None:
                whole = state.exact(name) + change.products[name]
            else:
                whole = LowRank(mean[0] * scale, mean[1])
                whole += state.residual.get(name, LowRank.zero(*whole.shape))
            most = None if mean else module.rank + self.residual_rank
            left, values, right = whole.svd(most, all_rows=mean is not None)
            kept = module.rank if self.energy is None else enough(values, self.energy)
            kept = min(module.rank, kept)
            rank = min(kept, significant(values, whole.shape))
            stop = max(kept, min(len(values), kept + self.residual_rank))
            share = (values[:rank] / scale) ** _SHARE_OF_A[self.balance]
            new_left = left[:, :rank] * (values[:rank] / scale / share)
            new_right = share[:, None] * right[:rank]
            residual[name] = LowRank(left[:, kept:stop] * values[kept:stop], right[kept:stop])
            if mean is None:
                factors[name] = pad(new_left, new_right, module.rank)
                modules[name] = ModuleReport(
                    rank,
                    significant(values, whole.shape),
                    float(np.linalg.norm(values)),
                    float(np.linalg.norm(values[kept:])),
                    float(np.linalg.norm(values[stop:])),
                )
                continue
            rows = right[rank : module.rank]  # of the old A: see the class
            new_right = np.vstack([new_right, rows])
            factors[name] = pad(np.pad(new_left, ((0, 0), (0, len(rows)))), new_right, module.rank)
            transport[name] = _transport(mean[1], factors[name][1])
            if name in change.products:
                modules[name] = measured(state, change, name, factors[name], residual[name])
        return Refactored(factors, residual, modules, transport)


@dataclass(frozen=True)
class Keep(Piece):
    """Refactor: none; the global factors move by their mean change."""

    kind = "keep"
    beside = False
    turns = False
    needs_products = False
    down = "r D"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Move the factors, and measure against the exact products where those are known."""
        factors, modules = {}, {}
        for module in state.adapter.spec.modules:
            name = module.name
            mean = mean_factors(state, change, name)
            if mean is None:
                raise RecipeError("Keep needs a mean of factors; choose refactor=Svd()")
            factors[name] = mean
            if name in change.products:
                modules[name] = measured(state, change, name, mean)
        return Refactored(factors, dict(state.residual), modules)


def mean_factors(state: GlobalState, change: Reduced, name: str) -> Factors | None:
    """A module's B and A after the change, float64; None if the change is of products alone."""
    if change.factors is None:
        return None
    left, right = state.adapter.factors(name)
    move_left, move_right = change.factors[name]
    return left + move_left, right + move_right


def measured(
    state: GlobalState,
    change: Reduced,
    name: str,
    factors: Factors,
    residual: LowRank | None = None,
) -> ModuleReport:
    """How far a module's new factors are from the exact new update.

    Args:
        state: after the last round.
        change: of this one, with the exact products.
        name: of the module.
        factors: the new B and A, without the scale.
        residual: what is kept of the rest; None for nothing.
    """
    exact = state.exact(name) + change.products[name]
    handed = LowRank(factors[0] * state.adapter.spec.scale(name), factors[1])
    rest = exact - handed
    distance = rest.norm()
    dropped = distance if residual is None else (rest - residual).norm()
    bound = min(exact.rank, *exact.shape)
    return ModuleReport(handed.rank, bound, exact.norm(), distance, dropped)


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


def _transport(old: Array, new: Array) -> Array:
    """The G of ``old = G new``, from the rows of the new A: they are orthogonal, of any length."""
    return np.asarray(old @ (new / np.sum(new**2, axis=1, keepdims=True)).T)
