"""Numbers of a privacy statement in words, for somebody who decides about data and not about code.

What is said to hold at most is rounded up: a promise must not get better by being written down.

>>> odds(1.0), odds(8.0), odds(49.5)
('2.8', '2,981', 'e to the power of 50, which is as good as no limit')
>>> at_most(3.502), at_most(8.0)
('3.51', '8.00')
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
        return f"e to the power of {math.ceil(epsilon)}, which is as good as no limit"
    factor = math.exp(epsilon)
    if factor >= 100:
        return f"{math.ceil(factor):,}"
    digits = 1 if factor < 10 else 0
    return f"{math.ceil(factor * 10**digits) / 10**digits:g}"


def at_most(epsilon: float) -> str:
    """An epsilon with two decimals, rounded up."""
    return f"{math.ceil(100 * epsilon) / 100:.2f}"


def span(pair: Sequence[float], *, percent: bool = False) -> str:
    """The least and the largest of some numbers, or the one that they all are."""

    def one(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:.3g}"

    low, high = pair
    return one(low) if low == high else f"{one(low)} to {one(high)}"
