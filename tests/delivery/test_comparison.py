"""The comparison of two releases: its error rate under continuous looking, and its power."""

from __future__ import annotations

import math

import numpy as np
import pytest

from federation.comparison import SHARES, Array, compare, log_bets, log_mixture

CLIP, ALPHA = 0.1, 0.05
RUNS, REPORTS = 1500, 80  # on each side


def reports(seed: int, mean: float, shape: tuple[int, ...]) -> Array:
    """Clipped changes as devices with 40 examples measure them: coarse, and skewed at the clip."""
    rng = np.random.default_rng(seed)
    changes = rng.binomial(40, 0.8 + mean, shape) - rng.binomial(40, 0.8, shape)
    return np.clip(changes / 40.0, -CLIP, CLIP)


def paths(values: Array, mean: float) -> Array:
    """What each bet against the true mean has become, after each report: (stakes, runs, n)."""
    scaled, u = (values + CLIP) / (2 * CLIP), np.asarray((mean + CLIP) / (2 * CLIP))
    return np.stack([np.cumsum(log_bets(share, scaled, u), axis=-1) for share in SHARES])


@pytest.mark.parametrize("true", [(0.0, 0.0), (0.0, 0.05), (0.15, -0.05)])
def test_looking_after_every_report_it_is_ever_wrong_less_often_than_stated(
    true: tuple[float, float],
) -> None:
    """The interval leaves out the truth only where the capital against it has reached 1/alpha."""
    a, b = (reports(7 + side, mean, (RUNS, REPORTS)) for side, mean in enumerate(true))
    means = [float(reports(70 + s, m, (200_000,)).mean()) for s, m in enumerate(true)]
    capital = log_mixture(paths(a, means[0]), paths(b, means[1]))
    ever = (capital >= -math.log(ALPHA)).any(axis=1).mean()
    assert ever <= ALPHA


def test_the_interval_is_what_the_capital_says_and_holds_the_truth() -> None:
    for seed in range(12):
        a, b = reports(seed, 0.0, (30,)), reports(seed + 100, 0.02, (25,))
        found = compare(a.tolist(), b.tolist(), clip=CLIP, alpha=ALPHA)
        capital = log_mixture(paths(a, 0.0)[..., -1], paths(b, 0.02)[..., -1])
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.difference <= found.high  # type: ignore[operator]
        if capital < -math.log(ALPHA):
            assert found.low <= 0.02 <= found.high


def test_a_difference_is_found_and_the_order_of_reports_plays_no_part() -> None:
    a, b = reports(1, -0.05, (120,)), reports(2, 0.05, (120,))
    found = compare(a.tolist(), b.tolist(), clip=CLIP, alpha=ALPHA)
    assert found.better == "b"
    assert compare(b.tolist(), a.tolist(), clip=CLIP, alpha=ALPHA).better == "a"
    again = compare(sorted(a), sorted(b), clip=CLIP, alpha=ALPHA)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))


def test_the_interval_shrinks_and_its_price_over_a_single_look_is_below_two() -> None:
    widths = []
    for count in (20, 80, 320, 1280):
        a, b = reports(3, 0.0, (count,)), reports(4, 0.0, (count,))
        found = compare(a.tolist(), b.tolist(), clip=CLIP, alpha=ALPHA)
        widths.append(found.high - found.low)  # type: ignore[operator]
        once = 2 * 1.96 * math.sqrt((a.var() + b.var()) / count)
        assert widths[-1] <= 2.1 * once
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("many", [(1, 1), (1, 40), (3, 500)])
def test_few_or_lopsided_devices_still_have_an_interval(many: tuple[int, int]) -> None:
    found = compare([0.0] * many[0], [0.0] * many[1], clip=CLIP)
    assert found.better == ""
    assert found.low is not None
    assert -2 * CLIP <= found.low < 0
    assert found.effect is None


def test_without_devices_on_a_side_nothing_is_said() -> None:
    found = compare([], [0.1], clip=CLIP)
    assert (found.low, found.difference, found.better, found.mean_b) == (None, None, "", 0.1)
