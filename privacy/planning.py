"""What a plan costs before anybody trains: noise to epsilon, epsilon to noise, rounds to the end.

    >>> plan = Plan(sample_rate=0.08, steps=130, delta=1e-5, noise_multiplier=1.0)
    >>> round(plan.answer().epsilon, 1)
    7.1
    >>> Plan(sample_rate=0.08, steps=130, delta=1e-5, epsilon=8.0).answer().noise_multiplier < 1
    True

Nothing here looks at data or at a ledger's file; the arithmetic is :mod:`privacy.calibration`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privacy.budget import Accountant, BudgetError, Unit
from privacy.calibration import LEAST_DELTA_BY_PLD, MOST_STEPS_BY_PLD
from privacy.calibration import epsilon as epsilon_of
from privacy.calibration import noise_multiplier as noise_for
from privacy.events import Event, SgdEvent
from privacy.noise_shares import counted_multiplier
from privacy.plan_shares import Shares

# Looking further ahead would answer a question that nobody has.
MOST_ROUNDS = 100_000
MOST_STEPS = 10**8
MOST_POINTS = 20
# An epsilon of 100 promises nothing, by either accountant, and pld is slow to say so.
MOST_EPSILON_BY_PLD = 100.0
MOST_EPSILON_TO_START = 1e5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a plan comes to.

    Attributes:
        noise_multiplier: as given, or the least that meets the epsilon asked for.
        epsilon: after all steps; infinity without noise.
        by_round: (round, epsilon after it), the last round included; of many rounds, some
            ``MOST_POINTS`` evenly spaced ones.
        rounds_within: how many such rounds the epsilon asked for pays for, at most
            ``MOST_ROUNDS``; None if no epsilon was asked for.
    """

    noise_multiplier: float
    epsilon: float
    by_round: tuple[tuple[int, float], ...]
    rounds_within: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training of some rounds by DP-SGD, with Poisson sampling, for one client.

    Attributes:
        sample_rate: probability with which each example enters a step; above 0, at most 1.
        steps: of one round; at least 1.
        delta: above 0 and below 1, and below 1 / ``examples``.
        rounds: at least 1.
        noise_multiplier: standard deviation of the noise over the clipping norm, or None.
        epsilon: what may be spent in all rounds, or None.
        examples: how many the client has, or None if that is not to be checked.
        accountant: how steps are composed.
        unit: what is protected; where it is a client, read clients for examples, and rounds for
            steps.
        shares: the cohort, if its clients add the noise; the unit is then a client.

    Raises:
        BudgetError: naming the option of ``airpeft privacy plan`` that is out of bounds.
    """

    sample_rate: float
    steps: int
    delta: float
    rounds: int = 1
    noise_multiplier: float | None = None
    epsilon: float | None = None
    examples: int | None = None
    accountant: Accountant = Accountant.RDP
    unit: Unit = Unit.EXAMPLE
    shares: Shares | None = None

    def __post_init__(self) -> None:
        check_delta(self.delta)
        _check_examples(self.examples, self.delta)
        if not 0 < self.sample_rate <= 1:
            raise BudgetError(
                f"--sample-rate {self.sample_rate:g} must be above 0 and at most 1: it is the "
                "expected batch over the number of examples, and a batch cannot be larger than "
                "the data"
            )
        for option, value in (("--steps", self.steps), ("--rounds", self.rounds)):
            if value < 1:
                raise BudgetError(f"{option} {value} must be a whole number of at least 1")
        if self.steps * self.rounds > MOST_STEPS:
            raise BudgetError(
                f"--steps {self.steps} in each of {self.rounds} rounds are above "
                f"{MOST_STEPS:,} steps in all: a plan of that length is surely a slip; use fewer"
            )
        if self.noise_multiplier is None and self.epsilon is None:
            raise BudgetError(
                "give --noise-multiplier to learn epsilon, --epsilon to learn the noise, or both "
                "to learn how many rounds the epsilon pays for"
            )
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        sigma = self.noise_multiplier
        if sigma is not None and not (math.isfinite(sigma) and sigma >= 0):
            raise BudgetError(f"--noise-multiplier {sigma:g} must be at least 0; usual: 0.5 to 4")
        if sigma == 0 and self.epsilon is not None:
            raise BudgetError(
                f"--noise-multiplier 0 gives no privacy, but --epsilon {self.epsilon:g} is asked "
                "for: leave --noise-multiplier out, and the noise that meets it is printed"
            )

        if self.shares is not None:
            self._check_shares()

    def _check_shares(self) -> None:
        if self.unit is not Unit.CLIENT or self.sample_rate != 1:
            raise BudgetError(
                "--mechanism distributed protects whole clients, and from the server that draws "
                "them: give --unit client and --sample-rate 1"
            )
        if self.accountant is not Accountant.RDP:
            raise BudgetError("--mechanism distributed is counted by Renyi: use --accountant rdp")

    def event(self, rounds: int = 1) -> SgdEvent:
        """Some rounds; the noise must have been given.

        Raises:
            BudgetError: the noise is not known yet.
        """
        if self.noise_multiplier is None:
            raise BudgetError("the noise is not known yet: ask answer()")
        noise = self.noise_multiplier
        return SgdEvent(
            noise_multiplier=counted_multiplier(noise) if self.shares and noise else noise,
            sample_rate=self.sample_rate,
            steps=self.steps * rounds,
            max_grad_norm=1.0,  # epsilon depends on the noise relative to it only
        )

    def answer(self, accountant: Accountant | None = None) -> Answer:
        """What the plan comes to.

        Args:
            accountant: instead of the plan's own.

        Raises:
            CalibrationError: if no noise meets the epsilon asked for.
        """
        by = accountant or self.accountant
        if self.noise_multiplier is None and self.epsilon is not None:
            unit_noise = replace(self, noise_multiplier=1.0).event(self.rounds)
            check_accountant([unit_noise], self.delta, by, most=MOST_EPSILON_TO_START)
            check_accountant([], self.delta, by, budget=self.epsilon)
            sigma = noise_for(
                self.epsilon, self.delta, self.sample_rate, self.steps * self.rounds, by
            )
            return replace(self, noise_multiplier=sigma, accountant=by).answer()
        event = self.event()
        check_accountant([self.event(self.rounds)], self.delta, by, budget=self.epsilon)
        points = min(self.rounds, MOST_POINTS)
        numbers = [math.ceil(i * self.rounds / points) for i in range(1, points + 1)]
        spent = tuple((n, epsilon_of([self.event(n)], self.delta, by)) for n in numbers)
        within = (
            None if self.epsilon is None else rounds_left([], event, self.epsilon, self.delta, by)
        )
        return Answer(
            noise_multiplier=self.noise_multiplier or 0.0,
            epsilon=spent[-1][1],
            by_round=spent,
            rounds_within=within,
        )


def by_accountant(plan: Plan, sigma: float) -> dict[Accountant, float | None]:
    """Epsilon of a plan by every accountant, side by side.

    Args:
        plan: its noise is not looked at.
        sigma: the noise multiplier.

    Returns:
        infinity without noise; None where an accountant cannot count so much.
    """
    event = replace(plan, noise_multiplier=sigma, epsilon=None).event(plan.rounds)
    found: dict[Accountant, float | None] = {}
    for accountant in [plan.accountant] if plan.shares else Accountant:
        try:
            check_accountant([event], plan.delta, accountant)
            found[accountant] = epsilon_of([event], plan.delta, accountant)
        except BudgetError:
            found[accountant] = None
    return found


def rounds_left(
    before: Sequence[Event],
    event: Event,
    epsilon: float,
    delta: float,
    accountant: Accountant = Accountant.RDP,
) -> int:
    """How often an event can still be repeated before a budget is passed.

    Args:
        before: what was already spent.
        event: one more round.
        epsilon: the budget, over everything.
        delta: the budget's delta.
        accountant: how events are composed.

    Returns:
        a whole number, at most ``MOST_ROUNDS``.
    """

    def fits(count: int) -> bool:
        more = [replace(event, steps=event.steps * count)] if count else []
        return epsilon_of([*before, *more], delta, accountant) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST_ROUNDS and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_ROUNDS)
    if high == MOST_ROUNDS and fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_accountant(
    events: Sequence[Event],
    delta: float,
    accountant: Accountant,
    *,
    budget: float | None = None,
    most: float = MOST_EPSILON_BY_PLD,
) -> None:
    """Refuse to count by pld what would take it more memory than a machine has.

    Args:
        events: what is to be counted.
        delta: at which.
        accountant: only pld is ever refused.
        budget: an epsilon up to which more will be counted.
        most: the largest epsilon, by rdp, that is let through.

    Raises:
        BudgetError: if the events, or the budget, are above that, or delta is too small for it.
    """
    if accountant is not Accountant.PLD or any(e.noise_multiplier == 0 for e in events):
        return
    steps = sum(event.steps for event in events)
    if steps > MOST_STEPS_BY_PLD or delta < LEAST_DELTA_BY_PLD:
        raise BudgetError(
            f"--accountant pld is for up to {MOST_STEPS_BY_PLD:,} steps and a delta of at least "
            f"{LEAST_DELTA_BY_PLD:g}, here {steps:,} and {delta:g}: use --accountant rdp"
        )
    found = epsilon_of(events, delta, Accountant.RDP)
    if found > most or (budget or 0.0) > MOST_EPSILON_BY_PLD:
        raise BudgetError(
            f"--accountant pld is for an epsilon up to {MOST_EPSILON_BY_PLD:g}, and here it would "
            f"have to go to {max(found, budget or 0.0):.4g}: use --accountant rdp"
        )


def check_delta(delta: float) -> None:
    """Refuse a delta that is no probability, or is certain.

    Raises:
        BudgetError: it is not above 0 and below 1.
    """
    if not 0 < delta < 1:
        raise BudgetError(
            f"--delta {delta:g} must be above 0 and below 1; a good choice is 0.1 / n for n "
            "examples, such as 1e-5"
        )


def check_epsilon(epsilon: float) -> None:
    """Refuse an epsilon that is not a positive number.

    Raises:
        BudgetError: it is not finite and above 0.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise BudgetError(f"--epsilon {epsilon:g} must be above 0; usual values are 1 to 10")


def _check_examples(examples: int | None, delta: float) -> None:
    if examples is None:
        return
    if examples < 1:
        raise BudgetError(f"--examples {examples} must be at least 1: the rows of the client")
    if delta * examples >= 1:
        raise BudgetError(
            f"--delta {delta:g} is not below 1/n = {1 / examples:.3g} for --examples {examples}, "
            "so publishing a whole example would pass for private: choose "
            f"{0.1 / examples:.1g} or less"
        )
