"""Noise that later rounds take back: the tree of partial sums, and what it costs.

    >>> prefix(6)   # rounds 1 to 6: the partial sum of the first four, and that of the next two
    ((2, 0), (1, 2))
    >>> sensitivity(rounds=1, participations=1, separation=1)
    1.0
    >>> round(sensitivity(rounds=8, participations=1, separation=8), 3)   # sqrt(4 levels)
    2.0

The partial sum ``(level, index)`` is that of rounds ``index 2^level + 1`` to ``(index + 1)
2^level`` of a tree, and has noise of its own, all of the same standard deviation. The sum of the
first t rounds is put together from those that the binary digits of t name (Dwork et al. 2010; Chan
et al. 2011; Kairouz et al. 2021, 2103.00039, without the improvement of Honaker 2015). Round t
releases the difference between two such sums: its own, and the noise of prefix t minus that of
prefix t - 1.

All of it is a function of the noisy partial sums, each noised once: one Gaussian mechanism, also
where what clients send depends on earlier releases (2103.00039, section 4; Denisov et al. 2022,
2202.08312). Its sensitivity is the Euclidean norm of what one client moves over all partial sums.
"""

from __future__ import annotations

import math

from aggregation.clipped_sum import Normals
from privacy.budget import BudgetError
from privacy.randomness import Floats

MOST_ROUNDS = 100_000


def prefix(rounds: int) -> tuple[tuple[int, int], ...]:
    """The partial sums whose sum is that of the first rounds, as (level, index)."""
    found, behind = [], 0
    for level in reversed(range(rounds.bit_length())):
        if rounds >> level & 1:
            found.append((level, behind >> level))
            behind += 1 << level
    return tuple(found)


def increment(number: int, normals: Normals, count: int) -> Floats:
    """The noise that a round releases, in units of that of a partial sum.

    Args:
        number: of the round in its tree, from 1.
        normals: the noise of the tree; each partial sum has its own name in it.
        count: numbers in a vector.
    """
    now, before = set(prefix(number)), set(prefix(number - 1))
    (new,) = now - before  # the digits above the lowest one of the number agree
    total = normals(_name(*new), count)
    for level, index in sorted(before - now):
        total = total - normals(_name(level, index), count)
    return total


def sensitivity(*, rounds: int, participations: int, separation: int) -> float:
    """Most that one client can move all partial sums together, Euclidean, in units of its clip.

    A client that takes part in k rounds of a tree, any two of them at least ``separation`` rounds
    apart, is at most ``m = ceil(2^level / separation)`` times in one partial sum of a level, so the
    squares of its parts in those of that level add up to ``floor(k / m) m^2 + (k mod m)^2`` at
    most. Only partial sums that some prefix uses count: those with an even index. Levels are added
    up. For k = 1 the result is the root of the number of levels, and exact.

    Args:
        rounds: of the tree.
        participations: k; more than the separation has room for are not counted.
        separation: 1 if a client may take part in consecutive rounds.

    Raises:
        BudgetError: if an argument is out of its bounds.
    """
    for name, value in (
        ("rounds", rounds),
        ("participations", participations),
        ("separation", separation),
    ):
        if type(value) is not int or not 1 <= value <= MOST_ROUNDS:
            raise BudgetError(f"{name}={value!r} must be a whole number of 1 to {MOST_ROUNDS}")
    most = min(participations, math.ceil(rounds / separation))
    squares = 0
    for level in range(rounds.bit_length()):
        sums = ((rounds >> level) + 1) // 2  # with an even index, and complete
        inside = min(most, math.ceil(2**level / separation))
        full = min(sums, most // inside)
        rest = most - full * inside if full < sums else 0
        squares += full * inside**2 + min(rest, inside) ** 2
    return math.sqrt(squares)


def _name(level: int, index: int) -> str:
    return f"node {level} {index}"
