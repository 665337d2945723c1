"""Epsilon against the two libraries it could come from, over a grid."""

from __future__ import annotations

import itertools
import logging
import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import calibration
from privacy.budget import Accountant, BudgetError
from privacy.calibration import CalibrationError, epsilon, noise_multiplier
from privacy.events import SgdEvent

DELTA = 1e-5
GRID = list(itertools.product((0.02, 0.1, 0.4), (0.7, 1.0, 2.5), (30, 300)))
# Ours uses fewer orders than either library, so it may only be looser, and by no more than this
# where epsilon is small enough to be promised.
LOOSER = 0.04
# The two tight ones, dp-accounting's PLD and Opacus' PRV, are numerical: they may differ by so much
# of epsilon, or twice that where epsilon is below 2.
AGREE = 0.01


def event(sigma: float = 1.0, rate: float = 0.1, steps: int = 10) -> SgdEvent:
    return SgdEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps, max_grad_norm=1.0)


@pytest.fixture(autouse=True)
def _quiet_opacus() -> None:
    logging.getLogger("opacus").setLevel(logging.ERROR)


@pytest.mark.parametrize(("rate", "sigma", "steps"), GRID)
def test_agrees_with_dp_accounting_and_with_opacus(rate: float, sigma: float, steps: int) -> None:
    from dp_accounting import dp_event, rdp
    from opacus.accountants import RDPAccountant

    ours = epsilon([event(sigma, rate, steps)], DELTA)
    theirs = rdp.RdpAccountant()
    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    reference = theirs.compose(step, steps).get_epsilon(DELTA)
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    opacus = accountant.get_epsilon(DELTA)
    for other in (reference, opacus):
        assert ours >= other * (1 - 0.02)
        if other <= 12:
            assert ours <= other * (1 + LOOSER)


@pytest.mark.parametrize("delta", [DELTA, 1e-7])
@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [*(g for g in GRID if g[2] == 30), (0.02, 1.0, 300), (0.1, 1.0, 300), (1.0, 3.0, 8)],
)
def test_the_tight_accountants_agree_and_are_below_the_bound(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    tight = epsilon([event(sigma, rate, steps)], delta, Accountant.PLD)
    assert tight <= epsilon([event(sigma, rate, steps)], delta)
    prv = opacus_prv([(sigma, rate, steps)], delta)
    assert tight == pytest.approx(prv, rel=AGREE, abs=2 * AGREE)


def test_the_tight_accountants_agree_on_rounds_of_different_noise() -> None:
    history = [(1.0, 0.08, 13), (1.3, 0.05, 20), (3.0, 1.0, 2)]
    events = [event(*one) for one in history]
    tight = epsilon(events, DELTA, Accountant.PLD)
    assert tight == pytest.approx(opacus_prv(history, DELTA), rel=AGREE, abs=2 * AGREE)
    assert tight <= epsilon(events, DELTA)


def opacus_prv(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it takes logarithms of zero on its way
        return float(accountant.get_epsilon(delta))


def test_events_of_different_noise_compose_as_dp_accounting_says() -> None:
    from dp_accounting import dp_event, rdp

    mixed = [event(1.0, 0.08, 13)] * 5 + [event(1.3, 0.05, 20)] * 5
    accountant = rdp.RdpAccountant()
    for e in mixed:
        step = dp_event.PoissonSampledDpEvent(
            e.sample_rate, dp_event.GaussianDpEvent(e.noise_multiplier)
        )
        accountant.compose(step, e.steps)
    reference = accountant.get_epsilon(DELTA)
    assert epsilon(mixed, DELTA) == pytest.approx(reference, rel=LOOSER)
    assert epsilon(list(reversed(mixed)), DELTA) == epsilon(mixed, DELTA)
    assert epsilon(mixed, DELTA) > epsilon(mixed[:-1], DELTA)


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_calibrated_noise_meets_the_target_and_hardly_more(
    accountant: Accountant, target: float
) -> None:
    sigma = noise_multiplier(target, DELTA, 0.2, 20, accountant)
    assert epsilon([event(sigma, 0.2, 20)], DELTA, accountant) <= target
    assert epsilon([event(sigma - 2e-4, 0.2, 20)], DELTA, accountant) > target


def test_rounds_add_up_to_the_calibrated_target() -> None:
    sigma = noise_multiplier(8.0, DELTA, 0.1, 5 * 6)
    rounds = [event(sigma, 0.1, 6)] * 5
    assert 7.9 < epsilon(rounds, DELTA) <= 8.0


def test_a_calibration_asks_the_accountant_a_dozen_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it costs, on a machine of any speed: plain bisection to 0.0001 would ask 17 times."""
    asked: list[float] = []

    def counted(events: list[SgdEvent], delta: float, accountant: Accountant) -> float:
        asked.append(events[0].noise_multiplier)
        return epsilon(events, delta, accountant)

    monkeypatch.setattr(calibration, "_spent", counted)
    noise_multiplier.cache_clear()
    for examples in range(120, 2520, 120):
        noise_multiplier(8.0, DELTA, 64 / examples, 25)
    noise_multiplier(8.0, DELTA, 64 / 120, 25)  # known already
    assert 20 < len(asked) <= 20 * 13


def test_the_edges() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([event(0.0)], DELTA) == math.inf
    with pytest.raises(BudgetError, match="delta"):
        epsilon([event()], 0.0)
    with pytest.raises(BudgetError, match="epsilon"):
        noise_multiplier(0.0, DELTA, 0.1, 10)
    with pytest.raises(CalibrationError, match="fewer steps"):
        noise_multiplier(1e-4, DELTA, 1.0, 100_000)


@given(
    sigma=st.floats(0.5, 8.0),
    factor=st.floats(1.01, 4.0),
    rate=st.floats(0.005, 0.5),
    steps=st.integers(1, 500),
)
@settings(max_examples=60, deadline=None)
def test_epsilon_falls_in_noise_along_a_line_of_the_log_log_plane(
    sigma: float, factor: float, rate: float, steps: int
) -> None:
    low, high = (epsilon([event(s, rate, steps)], DELTA) for s in (sigma, sigma * factor))
    assert 0 <= high <= low
    if high > 0.05 and factor > 1.5:
        slope = math.log(high / low) / math.log(factor)
        assert -3.5 <= slope <= -0.8


@pytest.mark.parametrize("accountant", list(Accountant))
def test_numbers_out_of_reach_count_as_what_is_worse(accountant: Accountant) -> None:
    for sigma in (0.0, 1e-300, 1e-5):
        assert epsilon([event(sigma)], DELTA, accountant) == math.inf
    assert 0.0 <= epsilon([event(1e300)], DELTA, accountant) < 0.01
    least = epsilon([event(1.0, rate=1e-9)], DELTA, accountant)
    assert epsilon([event(1.0, rate=1e-300)], DELTA, accountant) == least < 0.01


def test_pld_counts_by_rdp_where_it_would_take_all_memory() -> None:
    """Who asks a client to train chooses noise and accountant, and must not bring it down."""
    for asked, delta in ((event(0.01, steps=10**5), DELTA), (event(steps=10), 1e-13)):
        found = epsilon([asked], delta, Accountant.PLD)
        assert found == epsilon([asked], delta, Accountant.RDP)
