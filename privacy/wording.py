"""Numbers of a privacy statement in words, for somebody who decides about data and not about code.

>>> odds(1.0), odds(8.0), odds(50.0)
('2.7', '2,981', 'e to the power of 50, which is as good as no limit')
>>> span([10, 10]), span([0.01, 0.02], percent=True)
('10', '1 % to 2 %')
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def odds(epsilon: float) -> str:
    """By what factor the odds on one unit change at most.

    Raises:
        ValueError: if epsilon is no number of 0 or more.
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon}")
    if epsilon > 20:
        return f"e to the power of {epsilon:.0f}, which is as good as no limit"
    factor = math.exp(epsilon)
    return f"{factor:.2g}" if factor < 100 else f"{factor:,.0f}"


def span(pair: Sequence[float], *, percent: bool = False) -> str:
    """The least and the largest of some numbers, or the one that they all are."""

    def one(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:.3g}"

    low, high = pair
    return one(low) if low == high else f"{one(low)} to {one(high)}"
