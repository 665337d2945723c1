"""Two releases on disjoint devices: which one changes accuracy for the better, and by how much.

What is compared is each device's change (after minus before, on its own held-out examples), so that
a device with hard examples does not count against its release. The interval for the difference of
the two means is Welch's: unequal variances, degrees of freedom after Satterthwaite (B. L. Welch,
Biometrika 34, 1947); the effect size is Hedges' g with its small-sample factor (L. V. Hedges,
J. Educational Statistics 6, 1981). Devices are the units: examples on one device are not
independent of each other. One look, at the end; looking at it early and stopping when it pleases
widens the error rate beyond the stated one.

    >>> found = compare([0.00, 0.01, 0.02, 0.01], [0.05, 0.06, 0.04, 0.05])
    >>> round(found.difference, 3), found.better
    (0.04, 'b')
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What devices say about two releases, a and b.

    Attributes:
        devices_a: that have measured a; likewise ``devices_b``.
        mean_a: mean change of accuracy with a; None without a device. Likewise ``mean_b``.
        difference: mean of b minus mean of a; None while one side has nothing.
        low: lower end of the interval for it; None while a side has fewer than two devices.
        high: upper end.
        effect: Hedges' g; None likewise, or where nothing varies.
        confidence: of the interval.
        better: ``a`` or ``b`` where the interval leaves out zero, else empty.
    """

    devices_a: int
    devices_b: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    effect: float | None = None
    confidence: float = CONFIDENCE
    better: str = ""
    method: str = "difference of mean changes over devices, Welch's interval, Hedges' g"


def compare(
    a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare the changes that two releases made.

    Args:
        a: accuracy after minus before on each device with the first release.
        b: likewise with the second.
        confidence: of the interval, above 0 and below 1.
    """
    mean_a = statistics.fmean(a) if a else None
    mean_b = statistics.fmean(b) if b else None
    sizes = {"devices_a": len(a), "devices_b": len(b), "confidence": confidence}
    if mean_a is None or mean_b is None:
        return Comparison(mean_a=mean_a, mean_b=mean_b, **sizes)  # type: ignore[arg-type]
    difference = mean_b - mean_a
    if min(len(a), len(b)) < 2:
        return Comparison(mean_a=mean_a, mean_b=mean_b, difference=difference, **sizes)  # type: ignore[arg-type]
    spread_a, spread_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    half = _quantile(confidence, spread_a, spread_b, len(a), len(b)) * math.sqrt(
        spread_a + spread_b
    )
    low, high = difference - half, difference + half
    return Comparison(
        mean_a=mean_a,
        mean_b=mean_b,
        difference=difference,
        low=low,
        high=high,
        effect=_hedges(a, b, difference),
        better="b" if low > 0 else "a" if high < 0 else "",
        **sizes,  # type: ignore[arg-type]
    )


def _quantile(confidence: float, spread_a: float, spread_b: float, a: int, b: int) -> float:
    from scipy.stats import t  # here, since only a comparison needs it and it loads slowly

    total = spread_a + spread_b
    if total == 0:
        return 0.0
    freedom = total**2 / (spread_a**2 / (a - 1) + spread_b**2 / (b - 1))
    return float(t.ppf((1 + confidence) / 2, freedom))


def _hedges(a: Sequence[float], b: Sequence[float], difference: float) -> float | None:
    freedom = len(a) + len(b) - 2
    pooled = (
        (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    ) / freedom
    if pooled == 0:
        return None
    return difference / math.sqrt(pooled) * (1 - 3 / (4 * freedom - 1))
