"""From noise to epsilon and back, by dp-accounting; no torch.

    >>> event = SgdEvent(noise_multiplier=1.0, sample_rate=0.08, steps=130, max_grad_norm=1.0)
    >>> round(epsilon([event], delta=1e-5), 1)
    7.1
    >>> sigma = noise_multiplier(8.0, 1e-5, sample_rate=0.08, steps=130)
    >>> 0.90 < sigma < 1.0
    True

Both directions use one accountant: noise calibrated with one and reported with another would make
a promise that nobody keeps. Events of any noise, rate and number compose. Neighbouring data sets
differ by adding or removing one example, and sampling is Poisson.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dp_accounting import dp_event, pld, rdp

from privacy.budget import Accountant, BudgetError, LocalPrivacy
from privacy.errors import PrivacyError
from privacy.events import Event, SgdEvent

# Whole orders have a closed form and cost a hundredth of the others (Mironov et al. 2019, section
# 3.3); the few fractional ones keep the bound within 4 % of that of the finest grid.
ORDERS = (
    *(2.25, 2.5, 2.75),
    *(order + 0.5 for order in range(3, 12)),
    *range(2, 33),
    *(36, 40, 48, 64, 96, 128, 256, 512),
)
# Losses are rounded up to this grid: the bound stays a bound, loose by some 0.1 %, in a tenth of
# the time that the finer default takes.
PLD_GRID = 1e-3
MAX_NOISE = 1000.0
# Beyond these the accountants' floating point gives up; what is outside counts as what is worse.
LEAST_NOISE, MOST_NOISE, LEAST_RATE = 1e-4, 1e6, 1e-9
# Privacy loss distributions grow with epsilon until they fill the memory, and there nobody needs
# them: pld gives the bound of rdp beyond these, which is never below it.
MOST_BY_RDP = 2000.0
MOST_STEPS_BY_PLD = 10**6
LEAST_DELTA_BY_PLD = 1e-11  # below it, the tails that are cut off count as lost
_DIGITS = 4

# dp-accounting tells of every order that it drops; a dropped order only makes the bound looser.
logging.getLogger("absl").addFilter(
    lambda record: "Excluding this order" not in record.getMessage()
)


# A client keeps its whole run within its budget by the run's accountant. One round of it by rdp is
# less than this many times that, whatever the accountant.
_ROOM = 2.0


class CalibrationError(PrivacyError):
    """No noise level meets the target."""


def epsilon(
    events: Sequence[Event], delta: float, accountant: Accountant | str = Accountant.RDP
) -> float:
    """Epsilon of all these events together, at this delta.

    Args:
        events: in any order; noise, rate and number of steps may differ. All are of one unit:
            what is spent on examples and on clients does not add up.
        delta: above 0 and below 1.
        accountant: how to compose.

    Returns:
        0 for no events; infinity if an event has no noise, or next to none.

    Raises:
        BudgetError: if delta is out of its bounds.
    """
    if not 0 < delta < 1:
        raise BudgetError(f"delta={delta} must be above 0 and below 1")
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.steps:
            sigma, rate = event.noise_multiplier, event.sample_rate
            steps[min(sigma, MOST_NOISE), max(rate, LEAST_RATE)] += event.steps
    if any(sigma < LEAST_NOISE for sigma, _ in steps):
        return math.inf
    if not steps:
        return 0.0
    return _compose(tuple(sorted(steps.items())), delta, Accountant(accountant))


@lru_cache(maxsize=4096)
def _compose(
    steps: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: Accountant
) -> float:
    if accountant is Accountant.PLD:
        bound = _compose(steps, delta, Accountant.RDP)
        many = sum(count for _, count in steps) > MOST_STEPS_BY_PLD or delta < LEAST_DELTA_BY_PLD
        if many or bound > MOST_BY_RDP:
            return bound
    machine = (
        rdp.RdpAccountant(ORDERS)
        if accountant is Accountant.RDP
        else pld.PLDAccountant(value_discretization_interval=PLD_GRID)
    )
    for (sigma, rate), count in steps:
        step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        machine.compose(step, count)
    return float(machine.get_epsilon(delta))


@lru_cache(maxsize=4096)
def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant | str = Accountant.RDP,
) -> float:
    """The least noise, in steps of 0.0001, with which these steps stay within epsilon.

    Args:
        epsilon: target after all steps; above 0.
        delta: above 0 and below 1.
        sample_rate: probability with which each example enters a step.
        steps: over the whole run: all rounds.
        accountant: how to compose.

    Raises:
        BudgetError: if an argument is out of its bounds.
        CalibrationError: if not even a noise of 1000 is enough.
    """
    accountant = Accountant(accountant)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise BudgetError(f"epsilon={epsilon} must be above 0")

    def spent(sigma: float) -> float:
        event = SgdEvent(
            noise_multiplier=sigma, sample_rate=sample_rate, steps=steps, max_grad_norm=1.0
        )
        return _spent([event], delta, accountant)

    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise CalibrationError(
                f"epsilon={epsilon} at delta={delta} cannot be reached in {steps} steps at "
                f"sample_rate={sample_rate} with a noise below {MAX_NOISE:.0f}: use fewer steps, "
                "a smaller sample rate, or a larger epsilon or delta"
            )
    # Epsilon falls with the noise roughly as a power, so the bracket shrinks on the log-log line;
    # the guard keeps a bad guess from stalling, and the last steps are plain bisection.
    tick = 10.0**-_DIGITS
    at_low, at_high = (spent(low) if low else math.inf), spent(high)
    while high - low > tick:
        middle = (low + high) / 2
        if math.isfinite(at_low) and high - low > 50 * tick:
            share = math.log(at_low / epsilon) / math.log(at_low / at_high)
            guess = low * (high / low) ** share
            middle = min(max(guess, low + (high - low) / 8), high - (high - low) / 8)
        value = spent(middle)
        if value > epsilon:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
    rounded = math.ceil(high / tick) * tick
    return round(rounded, _DIGITS)


_spent = epsilon


def told_event(values: Mapping[str, Any], asked: LocalPrivacy | None) -> SgdEvent:
    """What a client says that it has spent, if one that did what it was asked may say so.

    Everything that clients say is composed by whoever asked them, and a lie of enormous numbers
    would take all memory, or leave nothing to state of the others.

    Args:
        values: from the wire.
        asked: what it was asked to keep to; None if only its form is looked at.

    Raises:
        BudgetError: if it is no event, or one of less privacy than was asked for.
    """
    event = SgdEvent.from_mapping(values)
    if asked is None:
        return event
    least = asked.noise_multiplier
    if least is not None and event.noise_multiplier < least:
        raise BudgetError(
            f"it tells of noise {event.noise_multiplier:g} and was asked for {least:g}"
        )
    if asked.epsilon is not None:
        spent = epsilon([event], asked.delta)
        if spent > _ROOM * asked.epsilon + 1.0:
            raise BudgetError(
                f"it tells of epsilon {spent:.4g} in one round and was asked for {asked.epsilon:g} "
                "in all"
            )
    return event
