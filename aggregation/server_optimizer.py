"""The optimise piece: what the server does with the mean change.

    >>> str(Sgd()), str(Momentum(beta=0.5))
    ('sgd', 'momentum(beta=0.5)')

What an optimiser remembers is the state's ``buffers``. It lives either in product space, as
low-rank matrices that no refactoring can touch, or entry by entry in the factors, where it is right
only as long as their gauge stays, or if it is transported when the gauge turns: with B' = B G and
A' = G^-1 A, a momentum M_B of B becomes M_B G, and one of A becomes G^-1 M_A. The ones with a rate
for every entry are in :mod:`aggregation.server_adaptive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from aggregation.errors import RecipeError
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Piece
from aggregation.reducing import Reduced
from aggregation.spec import AdapterSpec
from aggregation.state import Buffers, GlobalState

MOMENTUM = "momentum"
_MOST_RATE = 1e6


class Optimise(Piece):
    """Base of the choices.

    Attributes:
        stateful: whether it remembers earlier rounds, so that it may move the adapter in a round
            in which nobody learnt anything.
        element_wise: whether entries of the factors have rates of their own, which mean nothing in
            another gauge and cannot be transported.
    """

    stateful: ClassVar[bool] = True
    element_wise: ClassVar[bool] = False

    def step(
        self, state: GlobalState, reduced: Reduced, sends: str = "both"
    ) -> tuple[Reduced, dict[str, Array]]:
        """The change to apply, and the new buffers.

        Args:
            state: after the last round.
            reduced: the mean change of this one.
            sends: the factors that clients sent in this round, ``both``, ``A``, ``B`` or ``core``
                (which is a B); the others keep their values and their buffers, so that what is
                frozen in a round is frozen bit for bit.
        """
        raise RecipeError(f"optimise={self} takes no step")

    def transport(
        self, spec: AdapterSpec, buffers: Buffers, transport: Mapping[str, Array]
    ) -> Buffers:
        """The buffers after the factors have been refactored.

        Args:
            spec: of the adapter.
            buffers: as :meth:`step` returned them.
            transport: by module, the (r, r) matrix G of B' = B G, A' = G^-1 A.
        """
        return buffers


@dataclass(frozen=True)
class Sgd(Optimise):
    """Optimise: add the mean change, times a server learning rate (Reddi et al. 2021, alg. 1).

    Attributes:
        learning_rate: eta; 1 is plain averaging.

    Raises:
        RecipeError: if it is not a positive finite number.
    """

    learning_rate: float = 1.0
    kind = "sgd"
    stateful = False

    def __post_init__(self) -> None:
        check_rate(self.kind, self.learning_rate, "1 is plain averaging")

    def step(
        self, state: GlobalState, reduced: Reduced, sends: str = "both"
    ) -> tuple[Reduced, dict[str, Array]]:
        """The change to apply; nothing is remembered."""
        eta = self.learning_rate
        if eta == 1.0:
            return reduced, {}
        factors = None
        if reduced.factors is not None:
            factors = {n: (eta * left, eta * right) for n, (left, right) in reduced.factors.items()}
        change = replace(
            reduced,
            products={name: product * eta for name, product in reduced.products.items()},
            factors=factors,
            others={key: eta * value for key, value in reduced.others.items()},
        )
        return change, {}


@dataclass(frozen=True)
class Momentum(Optimise):
    """Optimise: server momentum, FedAvgM (Hsu et al. 2019, 1909.06335, section 4.2).

    ``v <- beta v + D``, ``x <- x + learning_rate v``, with D the weighted mean change. (The paper
    writes its D with the other sign, and has no rate: its rate is 1.) A steady D moves x by
    learning_rate / (1 - beta) of it per round, ten times as far as plain averaging by default.

    After a mean of factors, v is one array per factor, and a refactoring transports it. After a
    reduce in product space, it is one low-rank matrix per module, recompressed in every round to
    at most ``rank``; the change of the round itself is applied in full, and only what is remembered
    of it is cut (Eckart and Young 1936).

    Attributes:
        beta: share of the old momentum that is kept; 0 is plain averaging.
        learning_rate: server learning rate.
        rank: most singular directions that are remembered per module, in product space.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    beta: float = 0.9
    learning_rate: float = 1.0
    rank: int = 64
    kind = "momentum"

    def __post_init__(self) -> None:
        check_rate(self.kind, self.learning_rate, "1 is the paper's")
        check_share(self.kind, "beta", self.beta)
        if self.rank < 1:
            raise RecipeError(
                f"momentum: rank={self.rank} must be 1 or more; for no memory choose optimise=sgd"
            )

    def step(
        self, state: GlobalState, reduced: Reduced, sends: str = "both"
    ) -> tuple[Reduced, dict[str, Array]]:
        """Beta times the old momentum plus the change, times the rate."""
        changes, buffers = tensor_changes(state, reduced, sends)
        steps = {}
        for key, change in changes.items():
            name = f"{MOMENTUM}/{key}"
            old = state.buffers.get(name)
            buffers[name] = change if old is None else self.beta * old + change
            steps[key] = self.learning_rate * buffers[name]
        if reduced.factors is not None:
            return in_factors(state, reduced, steps), buffers
        products = {}
        for name, product in reduced.products.items():
            velocity = self.beta * _remembered(state, name, product.shape) + product
            products[name] = self.learning_rate * velocity
            kept = velocity.best(self.rank)
            if kept.rank:
                buffers[f"{MOMENTUM}/{name}/B"] = kept.B
                buffers[f"{MOMENTUM}/{name}/A"] = kept.A
        return replace(reduced, products=products, others=steps), buffers

    def transport(
        self, spec: AdapterSpec, buffers: Buffers, transport: Mapping[str, Array]
    ) -> Buffers:
        """M_B G for every B and G^-1 M_A for every A: the same motion of the product."""
        moved = dict(buffers)
        for module, turn in transport.items():
            key_a, key_b = (f"{MOMENTUM}/{key}" for key in spec.module(module).keys)
            if key_b in buffers:
                moved[key_b] = buffers[key_b] @ turn
            if key_a in buffers:
                moved[key_a] = np.linalg.pinv(turn) @ buffers[key_a]
        return moved


def tensor_changes(
    state: GlobalState, reduced: Reduced, sends: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The mean changes by tensor name, and the buffers of factors that were not sent this round.

    After a reduce in product space there are only the tensors outside the modules.
    """
    changes: dict[str, Array] = dict(reduced.others)
    idle: set[str] = set()
    for name, (left, right) in (reduced.factors or {}).items():
        key_a, key_b = state.adapter.spec.module(name).keys
        if sends == "A":
            idle.add(key_b)
        else:
            changes[key_b] = left
        if sends in ("B", "core"):
            idle.add(key_a)
        else:
            changes[key_a] = right
    kept = {name: b for name, b in state.buffers.items() if name.partition("/")[2] in idle}
    return changes, kept


def in_factors(state: GlobalState, reduced: Reduced, steps: Mapping[str, Array]) -> Reduced:
    """A change whose factors and other tensors take these steps.

    Where the exact products are known, what the report calls exact moves along, so that its error
    stays that of the aggregation: ``exact mean - product of the mean factors``. Entry-wise steps
    have no exact counterpart in product space that they could be compared with.

    Args:
        state: after the last round.
        reduced: the mean change before the step.
        steps: by tensor name; a factor that is not there takes the mean change.
    """
    spec = state.adapter.spec
    factors, products = {}, {}
    for name, (left, right) in (reduced.factors or {}).items():
        key_a, key_b = spec.module(name).keys
        factors[name] = (steps.get(key_b, left), steps.get(key_a, right))
        if name in reduced.products:
            old_left, old_right = state.adapter.factors(name)
            scale = spec.scale(name)
            mean = LowRank((old_left + left) * scale, old_right + right)
            new = LowRank((old_left + factors[name][0]) * scale, old_right + factors[name][1])
            products[name] = new - mean + reduced.products[name]
    others = {key: steps.get(key, change) for key, change in reduced.others.items()}
    return replace(reduced, products=products, factors=factors, others=others)


def nothing(state: GlobalState, factors: bool) -> Reduced:
    """The mean change of a round in which nobody learnt anything.

    Args:
        state: after the last round.
        factors: whether the reduce yields changes of the factors, or of products alone.
    """
    modules = state.adapter.spec.modules
    zeros = {key: np.zeros(shape) for key, shape in state.adapter.spec.shapes().items()}
    inside = {key for m in modules for key in m.keys}
    return Reduced(
        {m.name: LowRank.zero(m.d_out, m.d_in) for m in modules},
        {m.name: (zeros[m.keys[1]], zeros[m.keys[0]]) for m in modules} if factors else None,
        {key: value for key, value in zeros.items() if key not in inside},
    )


def is_nothing(change: Reduced) -> bool:
    """Whether a change leaves everything as it is, exactly."""
    if change.factors is None:
        moving = any(m.B.any() and m.A.any() for m in change.products.values())
    else:
        moving = any(left.any() or right.any() for left, right in change.factors.values())
    return not moving and not any(value.any() for value in change.others.values())


def check_rate(kind: str, rate: float, usual: str) -> None:
    """Refuse a learning rate that is not positive, or so large that a step may overflow.

    Raises:
        RecipeError: naming it.
    """
    if not 0 < rate <= _MOST_RATE:  # NaN is neither
        raise RecipeError(
            f"{kind}: server learning_rate={rate} must be above 0 and at most {_MOST_RATE:g}; "
            f"{usual}"
        )


def check_share(kind: str, name: str, value: float) -> None:
    """Refuse a decay rate outside 0 (included) to 1 (excluded).

    Raises:
        RecipeError: naming it.
    """
    if not 0 <= value < 1:
        raise RecipeError(f"{kind}: {name}={value} must be 0 or more and below 1; usual is 0.9")


def _remembered(state: GlobalState, module: str, shape: tuple[int, int]) -> LowRank:
    left = state.buffers.get(f"{MOMENTUM}/{module}/B")
    right = state.buffers.get(f"{MOMENTUM}/{module}/A")
    return LowRank.zero(*shape) if left is None or right is None else LowRank(left, right)
