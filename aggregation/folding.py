"""Refactorings that lose nothing, because the rest is applied beside the adapter for ever.

The papers merge that rest into the base model. Here it stays a low-rank matrix of its own, always:
merging into a quantised base would lose it (rounding to 4 bits is coarser than the update), and no
base model has to be sent. Nothing in this package writes to a base.

``fold=true`` says that whoever loads the result is going to merge the rest into a base on their
own, in full precision and starting from the pristine weights. It changes no number; it makes
``Recipe.check_base`` refuse a base that is quantised, so that the intention is not lost on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aggregation.init import initial_adapter
from aggregation.low_rank import LowRank
from aggregation.piece import Piece
from aggregation.reducing import Reduced
from aggregation.refactoring import Keep, Refactored, pad, significant
from aggregation.report import ModuleReport
from aggregation.state import GlobalState


@dataclass(frozen=True)
class SvdFold(Piece):
    """Refactor: the best factors of the rank train on, the rest is applied beside them for ever.

    FedMomentum (2603.08014): with U S V^T the SVD of the mean of the trainable products, the first
    r directions are the next factors and the others are folded into the base. Here they stay a
    low-rank matrix of their own, since folding into a quantised base would lose them. The paper's
    SVD is a randomised one of the dense mean; ours is exact, of the stacked factors.

    Attributes:
        fold: whether the receiver is going to merge the rest into a base of full precision.
    """

    fold: bool = False
    kind = "svd-fold"
    beside = True
    turns = True
    needs_products = True
    down = "K r D"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Split the trainable update of every module; the rest joins the residual."""
        spec = state.adapter.spec
        factors, residual, modules = {}, {}, {}
        for module in spec.modules:
            trained = LowRank.of(state.adapter, module.name) + change.products[module.name]
            left, values, right = trained.svd()
            rank = min(module.rank, significant(values, trained.shape))
            scaled = left[:, :rank] * (values[:rank] / spec.scale(module.name))
            factors[module.name] = pad(scaled, right[:rank], module.rank)
            tail = LowRank(left[:, rank:] * values[rank:], right[rank:])
            residual[module.name], modules[module.name] = _beside(
                state, module.name, change, tail, rank
            )
        return Refactored(factors, residual, modules)


@dataclass(frozen=True)
class MeanResidual(Piece):
    """Refactor: means of the factors, and what their product misses beside them for ever.

    FedEx-LoRA (2410.09432): A and B become their means, and ``sum p_k s_k B_k A_k - s B A`` is
    added to the base. Here it stays a low-rank matrix of its own, whose rank grows by (K - 1) r a
    round at most. With a server optimiser that moves the factors otherwise than by their mean, what
    is added is what their mean would have missed.

    Attributes:
        fold: whether the receiver is going to merge the rest into a base of full precision.
    """

    fold: bool = False
    kind = "mean-residual"
    beside = True
    turns = False
    needs_products = True
    down = "K r D"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """Move the factors as :class:`Keep` does; what that misses joins the residual."""
        kept = Keep().apply(state, change)
        residual, modules = {}, {}
        for name, (left, right) in kept.factors.items():
            trained = LowRank.of(state.adapter, name) + change.products[name]
            missed = trained - LowRank(left * state.adapter.spec.scale(name), right)
            residual[name], modules[name] = _beside(state, name, change, missed, right.shape[0])
        return Refactored(kept.factors, residual, modules)


@dataclass(frozen=True)
class Fresh(Piece):
    """Refactor: the whole update goes beside, and training begins afresh.

    FLoRA (2409.05976): the stacked factors, whose product is the exact mean, are merged into the
    base, and the next round starts from a new A and B = 0. Here the stack stays a low-rank matrix
    of its own, compressed without loss.

    Attributes:
        fold: whether the receiver is going to merge the stack into a base of full precision.
    """

    fold: bool = False
    kind = "fresh"
    beside = True
    turns = True
    needs_products = True
    down = "K r D"

    def apply(self, state: GlobalState, change: Reduced) -> Refactored:
        """New factors, drawn from the number of the round; all that was learnt is the residual."""
        # Biases that train start at the base's own values; they are not drawn, nor begun afresh.
        bare = replace(state.adapter.spec, others=(), settings=())
        fresh = initial_adapter(bare, seed=state.round + 1)
        factors, residual, modules = {}, {}, {}
        for module in state.adapter.spec.modules:
            left, right = fresh.factors(module.name)
            factors[module.name] = (left.astype(np.float64), right.astype(np.float64))
            trained = LowRank.of(state.adapter, module.name) + change.products[module.name]
            residual[module.name], modules[module.name] = _beside(
                state, module.name, change, trained, 0
            )
        return Refactored(factors, residual, modules)


def _beside(
    state: GlobalState, name: str, change: Reduced, rest: LowRank, rank: int
) -> tuple[LowRank, ModuleReport]:
    """The residual with ``rest`` added, and the measurement: nothing is dropped."""
    exact = state.exact(name) + change.products[name]
    old = state.residual.get(name, LowRank.zero(*exact.shape))
    left, values, right = (old + rest).svd()
    # What is left of a difference of larger matrices is rounding of their size, not of its own.
    floor = 64 * np.finfo(np.float64).eps * max(exact.shape) * exact.norm()
    keep = int(np.sum(values > floor))
    residual = LowRank(left[:, :keep] * values[:keep], right[:keep])
    bound = min(exact.rank, *exact.shape)
    return residual, ModuleReport(rank, bound, exact.norm(), residual.norm(), 0.0)
