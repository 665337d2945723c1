"""Two releases on disjoint devices: which one changes accuracy for the better, and by how much.

What is compared is each device's change (after minus before, on its own held-out examples), so that
a device with hard examples does not count against its release. A change beyond ``clip`` counts as
``clip``, as in :mod:`federation.evidence`; what is estimated is the difference of the two means of
such changes. Devices are the units: examples on one device are not independent of each other.

**The interval may be looked at after every report**, and the comparison stopped when it pleases:
the chance that it *ever* leaves out the true difference is at most ``alpha``. It is a confidence
sequence by betting (I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 86(1), 2024, sections 3 and 4; time-uniform bounds in general: S. Howard et al.,
Annals of Statistics 49(2), 2021). For two candidate means (u, v), a bet on every report multiplies
a capital of one by 1 + L (x - u) for a device of the first release, by 1 + M (y - v) for one of the
second. If (u, v) are the means, no bet grows in the mean, in whatever order the reports come, nor
does a mixture of bets; so (Ville) it ever reaches 1/alpha with a chance of at most alpha. The
interval is made of the differences v - u of all pairs whose capital is below 1/alpha. Half of the
mixture bets against both with opposite stakes of one size, which finds a difference with balanced
sides soonest; the other half takes all pairs of stakes. A mixture of fixed stakes depends on the
reports alone, not on their order: nothing else has to survive a kill.

The effect size is Hedges' g with its small-sample factor (L. V. Hedges, J. Educational Statistics
6, 1981): a description, without an error rate. Lying devices are not accounted for here.

    >>> found = compare([0.00, 0.01] * 30, [0.05, 0.06] * 30, clip=0.1)
    >>> round(found.difference, 3), found.better, found.low > 0.02
    (0.05, 'b', True)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.evidence import STAKES

Array = NDArray[np.float64]
SHARES = np.array([*STAKES, *(-share for share in STAKES)])  # of the largest stake on either side
CELLS = 96  # of the grid over each mean


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What devices say about two releases, a and b.

    Attributes:
        devices_a: that have measured a; likewise ``devices_b``.
        mean_a: mean clipped change of accuracy with a; None without a device. Likewise ``mean_b``.
        difference: mean of b minus mean of a; None while one side has nothing.
        low: lower end of the interval for it; None while a side has no device.
        high: upper end.
        effect: Hedges' g; None while a side has fewer than two devices, or where nothing varies.
        confidence: of the interval, over all looks together.
        clip: changes beyond this count as this.
        better: ``a`` or ``b`` where the interval leaves out zero, else empty.
        method: in words.
    """

    devices_a: int
    devices_b: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    effect: float | None = None
    confidence: float
    clip: float
    better: str = ""
    method: str = (
        "difference of mean clipped changes over devices: confidence sequence by betting, valid at"
        " every look; Hedges' g"
    )


def compare(
    a: Sequence[float], b: Sequence[float], *, clip: float, alpha: float = 0.05
) -> Comparison:
    """Compare the changes that two releases made.

    Args:
        a: accuracy after minus before on each device with the first release.
        b: likewise with the second.
        clip: larger changes count as this; above 0, up to 1.
        alpha: chance that the interval ever leaves out the truth; above 0 and below 1.
    """
    x, y = (np.clip(np.asarray(one, np.float64), -clip, clip) for one in (a, b))
    one = Comparison(
        devices_a=x.size,
        devices_b=y.size,
        mean_a=float(x.mean()) if x.size else None,
        mean_b=float(y.mean()) if y.size else None,
        confidence=1 - alpha,
        clip=clip,
    )
    if not x.size or not y.size:
        return one
    low, high = _interval((x + clip) / (2 * clip), (y + clip) / (2 * clip), alpha)
    low, high = 2 * clip * low, 2 * clip * high
    return Comparison(
        devices_a=x.size,
        devices_b=y.size,
        mean_a=one.mean_a,
        mean_b=one.mean_b,
        difference=float(y.mean() - x.mean()),
        low=low,
        high=high,
        effect=_hedges(x.tolist(), y.tolist()),
        confidence=one.confidence,
        clip=clip,
        better="b" if low > 0 else "a" if high < 0 else "",
    )


def log_capitals(values: Array, means: Array) -> Array:
    """Logarithm of what each bet against each candidate mean has become of one.

    Args:
        values: shape (n,), in [0, 1].
        means: shape (m,), in [0, 1].

    Returns:
        Shape (stakes, m), in the order of :data:`SHARES`.
    """
    several, counts = np.unique(values, return_counts=True)
    return np.stack([counts @ log_bets(share, several[:, None], means) for share in SHARES])


def log_bets(share: float, values: Array, means: Array) -> Array:
    """Logarithm of what one bet on each value makes of one; shapes broadcast.

    Args:
        share: of the largest stake, with which the worst value would lose everything.
        values: in [0, 1].
        means: candidates, in [0, 1].
    """
    most = np.maximum(means if share > 0 else 1 - means, 1e-12)
    found: Array = np.log1p(share / most * (values - means))
    return found


def log_mixture(bets_a: Array, bets_b: Array) -> Array:
    """Logarithm of the mixed capital against pairs of candidate means.

    Args:
        bets_a: shape (stakes, ...), as :func:`log_capitals` gives them for the first release.
        bets_b: likewise for the second; the shapes broadcast after the stakes.
    """
    count = len(SHARES)
    opposite = np.roll(np.arange(count), count // 2)  # the stake of the same size, the other way
    pairs = np.asarray(-np.inf)
    for mine, other in enumerate(opposite):
        pairs = np.logaddexp(pairs, bets_a[mine] + bets_b[other])
    alone_a, alone_b = (np.logaddexp.reduce(bets) - math.log(count) for bets in (bets_a, bets_b))
    every: Array = np.logaddexp(pairs - math.log(count), alone_a + alone_b)
    return every - math.log(2)


def _interval(x: Array, y: Array, alpha: float) -> tuple[float, float]:
    """Of the difference of the means of values in [0, 1]; rounded outwards to the grid."""
    limit, centre = -math.log(alpha), (float(x.mean()), float(y.mean()))
    spread = max(float(x.var()), float(y.var())) + 1 / min(x.size, y.size)
    span = 3 * math.sqrt((limit + 3) * spread / min(x.size, y.size))
    while True:
        grids = [
            np.linspace(max(0.0, middle - span), min(1.0, middle + span), CELLS + 1)
            for middle in centre
        ]
        bets_a, bets_b = (log_capitals(*one) for one in ((x, grids[0]), (y, grids[1])))
        capital = log_mixture(bets_a[:, :, None], bets_b[:, None, :])
        left = capital < limit
        sides = [np.atleast_1d(left.any(axis=axis)) for axis in (1, 0)]
        # What lies on the border of the box, but not of the possible, may go on beyond it.
        cut = any(
            (seen[0] and grid[0] > 0) or (seen[-1] and grid[-1] < 1)
            for seen, grid in zip(sides, grids, strict=True)
        )
        if not cut:
            break
        span *= 2
    step = float(grids[0][1] - grids[0][0] + grids[1][1] - grids[1][0])
    apart = grids[1][None, :] - grids[0][:, None]
    found = apart[left]
    middle = centre[1] - centre[0]  # always possible: by concavity no bet has won against it
    low = min(middle, float(found.min(initial=middle))) - step
    high = max(middle, float(found.max(initial=middle))) + step
    return max(-1.0, low), min(1.0, high)


def _hedges(a: Sequence[float], b: Sequence[float]) -> float | None:
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return None
    pooled = (
        (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    ) / freedom
    if pooled == 0:
        return None
    difference = statistics.fmean(b) - statistics.fmean(a)
    return difference / math.sqrt(pooled) * (1 - 3 / (4 * freedom - 1))
