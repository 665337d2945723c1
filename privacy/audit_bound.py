"""A lower bound on epsilon from guesses about planted canaries (Steinke, Nasr and Jagielski 2023).

Each of m canaries is put in or left out by a fair coin. Whoever sees what the mechanism released
guesses for some of them which it was. If the mechanism is (epsilon, delta)-private, too many right
guesses are improbable; so many right guesses put a lower bound on epsilon ("Privacy auditing with
one (1) training run", 2305.08846, theorem 5.2 and appendix D).

    >>> lower_bound(canaries=1000, guesses=100, right=100, delta=0.0)   # never wrong
    3.4...
    >>> lower_bound(canaries=1000, guesses=100, right=50, delta=1e-5)   # no better than a coin
    0.0

One training run suffices: all canaries are judged at once. The bound is a statement about this
mechanism with this much confidence, and says nothing about how much better another attack could do.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from privacy.errors import PrivacyError

LARGEST = 100.0


class AuditError(PrivacyError):
    """An audit that was asked for something impossible."""


def p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses under any (epsilon, delta)-private mechanism.

    Args:
        canaries: m, how many coins were flipped.
        guesses: r, how many guesses were made; the number was fixed before.
        right: v, how many of them were right.
        epsilon: of the claim.
        delta: of the claim.

    Returns:
        a number in 0..1: P[Binomial(r, e^eps / (1 + e^eps)) >= v] + 2 m delta alpha.

    Raises:
        AuditError: if the counts make no sense.
    """
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise AuditError(
            f"right={right}, guesses={guesses}, canaries={canaries} must satisfy "
            "0 <= right <= guesses <= canaries, with at least one guess"
        )
    share = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, share))
    # The excess that delta may add is worth most at the i that maximises the mean mass just below.
    below = binom.pmf(right - np.arange(1, right + 1), guesses, share)
    ranks = np.arange(1, right + 1)
    alpha = float(np.max(np.cumsum(below) / ranks)) if right else 0.0
    return min(1.0, beta + 2.0 * canaries * delta * alpha)


def lower_bound(
    *, canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that is refuted at this confidence; 0 if none is.

    Args:
        canaries: m.
        guesses: r.
        right: v.
        delta: at which epsilon is claimed.
        confidence: probability with which a true claim is not refuted.

    Raises:
        AuditError: if the counts or the confidence make no sense.
    """
    if not 0 < confidence < 1:
        raise AuditError(f"confidence={confidence} must be above 0 and below 1; usual is 0.95")

    def refuted(epsilon: float) -> bool:
        value = p_value(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )
        return value < 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < LARGEST:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guess(
    scores: npt.NDArray[np.float64],
    planted: npt.NDArray[np.bool_],
    share: float = 0.2,
    centre: float = 0.0,
) -> tuple[int, int]:
    """Guess "in" above the centre and "out" below it, for the scores farthest from it.

    Args:
        scores: of each canary: higher means more likely in.
        planted: whether it was in.
        share: of the canaries that are guessed about; fixed before looking.
        centre: the score that says nothing; :func:`widest_gap` finds one without looking at who
            was planted.

    Returns:
        (guesses, right).

    Raises:
        AuditError: if there are too few canaries for one guess.
    """
    guesses = int(share * len(scores))
    if scores.shape != planted.shape or guesses < 1:
        raise AuditError(
            f"{len(scores)} canaries with share={share} leave no guess: plant more canaries"
        )
    sure = np.argsort(-np.abs(scores - centre), kind="stable")[:guesses]
    return guesses, int(((scores[sure] > centre) == planted[sure]).sum())


def widest_gap(scores: npt.NDArray[np.float64]) -> float:
    """The middle of the widest gap in the middle fifth of the scores.

    Fair coins put about half of the canaries in. Where a mechanism hides nothing, the scores fall
    into two heaps, and this is between them.

    Args:
        scores: of the canaries, (m,).

    Raises:
        AuditError: there are too few to have a middle.

    >>> widest_gap(np.array([0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 5.1, 5.2, 5.3, 5.4]))
    2.7
    """
    ordered = np.sort(scores)
    first, last = int(0.4 * len(ordered)), math.ceil(0.6 * len(ordered)) + 1
    middle = ordered[first:last]
    if len(middle) < 2:
        raise AuditError(f"{len(scores)} canaries have no middle: plant more canaries")
    at = int(np.argmax(np.diff(middle)))
    return float((middle[at] + middle[at + 1]) / 2.0)
