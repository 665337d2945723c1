"""Server optimisers with a rate for every entry: FedAdam, FedYogi, FedAdagrad.

Reddi et al. 2021 (2003.00295), algorithm 2. With D_t the weighted mean change of round t and all
operations entry by entry,

    m_t = beta1 m_(t-1) + (1 - beta1) D_t
    v_t = v_(t-1) + D_t^2                                          FedAdagrad
    v_t = v_(t-1) - (1 - beta2) D_t^2 sign(v_(t-1) - D_t^2)        FedYogi
    v_t = beta2 v_(t-1) + (1 - beta2) D_t^2                        FedAdam
    x_(t+1) = x_t + learning_rate m_t / (sqrt(v_t) + tau)

    >>> str(FedYogi(tau=0.01))
    'fedyogi(tau=0.01)'

The start is m = 0 and v = tau^2, the least that the algorithm allows ("v_(-1) >= tau^2"), and there
is no bias correction: the paper has none. v holds squares of the change itself; its first preprint
and code derived from it square the momentum instead. Weights are those of the recipe, where the
paper's experiments weigh by examples too and its algorithm writes a plain mean.

**Rates.** With small steady changes D an entry moves by learning_rate / (2 tau) of D until v has
forgotten its start, then by learning_rate D / (|D| + tau); in the first round by 1 - beta1 of that.
The paper tunes the rate for networks that are trained whole. Taken over (Flower's default is 0.1)
it is many times what LoRA's factors change in a round: in the first rounds of our demo scenario,
under plain averaging, their entries changed by 0.0006 (root mean square), those of the head by 0.1
to 0.16. So the rate of the factors is 0.002, twice tau, which takes small steady changes whole and
limits every entry to about 0.002 a round; and the head, which starts from noise, has a rate of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregation.errors import RecipeError
from aggregation.low_rank import Array
from aggregation.reducing import Reduced
from aggregation.server_optimizer import (
    Optimise,
    check_rate,
    check_share,
    in_factors,
    tensor_changes,
)
from aggregation.spec import AdapterSpec
from aggregation.state import Buffers, GlobalState

FIRST, SECOND, STEPS = "first-moment", "second-moment", "steps"


class _Adaptive(Optimise):
    """What the three have in common."""

    element_wise = True
    learning_rate: float
    head_learning_rate: float
    beta1: float
    tau: float

    def __post_init__(self) -> None:
        check_rate(self.kind, self.learning_rate, "usual for LoRA is 0.002")
        check_rate(self.kind, self.head_learning_rate, "usual for a head is 0.1")
        check_share(self.kind, "beta1", self.beta1)
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise RecipeError(
                f"{self.kind}: tau={self.tau} must be positive and finite; usual is 0.001"
            )

    def second_moment(self, old: Array, squared: Array) -> Array:
        """v_t from v_(t-1) and D_t^2."""
        raise RecipeError(f"optimise={self} has no second moment")

    def start(self, shape: tuple[int, ...]) -> Array:
        """The second moment before the first round: tau^2."""
        return np.full(shape, self.tau**2)

    def corrections(self, steps: int) -> tuple[float, float]:
        """What m and v are divided by before the step."""
        return 1.0, 1.0

    def step(
        self, state: GlobalState, reduced: Reduced, sends: str = "both"
    ) -> tuple[Reduced, dict[str, Array]]:
        """Algorithm 2 on every tensor of the factors, and on those outside the modules.

        Raises:
            RecipeError: if there are no factors, but products only.
        """
        if reduced.factors is None:
            raise RecipeError(f"optimise={self} needs a mean of factors; choose reduce=factor-mean")
        changes, buffers = tensor_changes(state, reduced, sends)
        heads = {tensor.key for tensor in state.adapter.spec.whole}
        taken = state.buffers.get(STEPS, np.zeros(1)) + 1.0
        m_share, v_share = self.corrections(int(taken[0]))
        steps = {}
        for key, change in changes.items():
            first, second = f"{FIRST}/{key}", f"{SECOND}/{key}"
            mean = self.beta1 * state.buffers.get(first, 0.0) + (1.0 - self.beta1) * change
            old = state.buffers.get(second)
            spread = self.second_moment(self.start(change.shape) if old is None else old, change**2)
            buffers[first], buffers[second] = mean, spread
            rate = self.head_learning_rate if key in heads else self.learning_rate
            steps[key] = rate * (mean / m_share) / (np.sqrt(spread / v_share) + self.tau)
        buffers[STEPS] = taken
        return in_factors(state, reduced, steps), buffers

    def transport(
        self, spec: AdapterSpec, buffers: Buffers, transport: Mapping[str, Array]
    ) -> Buffers:
        """The buffers as they are, if the gauge stayed.

        Raises:
            RecipeError: if it turned: squares of entries mean nothing in another gauge.
        """
        if transport:
            raise RecipeError(
                f"optimise={self} has a rate for every entry of the factors, and those have been "
                "refactored; choose optimise=momentum"
            )
        return buffers


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Optimise: Adam at the server (Reddi et al. 2021, 2003.00295, algorithm 2).

    Attributes:
        learning_rate: eta of the factors; twice tau, so that small steady changes are taken whole
            and no entry moves by more than this in a round.
        head_learning_rate: eta of tensors of the base that are saved whole, such as a head.
        beta1: decay of the first moment.
        beta2: decay of the second moment (0.99 in the paper).
        tau: degree of adaptivity; v starts at its square.
        bias_correction: Adam's own (Kingma and Ba 2015, 1412.6980, algorithm 1), which the paper
            does without: v starts at 0, and m and v are divided by 1 - beta^t.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    learning_rate: float = 0.002
    head_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 0.001
    bias_correction: bool = False
    kind = "fedadam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.kind, "beta2", self.beta2)

    def second_moment(self, old: Array, squared: Array) -> Array:
        """A decaying mean of the squares."""
        return self.beta2 * old + (1.0 - self.beta2) * squared

    def start(self, shape: tuple[int, ...]) -> Array:
        """tau^2, or 0 if the bias of a start at 0 is corrected."""
        return np.zeros(shape) if self.bias_correction else super().start(shape)

    def corrections(self, steps: int) -> tuple[float, float]:
        """1 - beta^t of each moment, if they are corrected."""
        if not self.bias_correction:
            return 1.0, 1.0
        return float(1.0 - self.beta1**steps), float(1.0 - self.beta2**steps)


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """Optimise: Yogi at the server (Reddi et al. 2021, 2003.00295, algorithm 2).

    The second moment moves by (1 - beta2) D^2 whatever its own size, so it forgets more slowly than
    Adam's after a large change.

    Attributes:
        learning_rate: eta of the factors; twice tau, as for :class:`FedAdam`.
        head_learning_rate: eta of tensors of the base that are saved whole, such as a head.
        beta1: decay of the first moment.
        beta2: decay of the second moment (0.99 in the paper).
        tau: degree of adaptivity; v starts at its square.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    learning_rate: float = 0.002
    head_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 0.001
    kind = "fedyogi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.kind, "beta2", self.beta2)

    def second_moment(self, old: Array, squared: Array) -> Array:
        """Towards the square, by (1 - beta2) of it."""
        return old - (1.0 - self.beta2) * squared * np.sign(old - squared)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """Optimise: Adagrad at the server (Reddi et al. 2021, 2003.00295, algorithm 2).

    Attributes:
        learning_rate: eta of the factors; twice tau, as for :class:`FedAdam`.
        head_learning_rate: eta of tensors of the base that are saved whole, such as a head.
        beta1: decay of the first moment; 0 in the paper's experiments.
        tau: degree of adaptivity; v starts at its square.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    learning_rate: float = 0.002
    head_learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 0.001
    kind = "fedadagrad"

    def second_moment(self, old: Array, squared: Array) -> Array:
        """The sum of all squares."""
        return old + squared
