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
    scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_], share: float = 0.2
) -> tuple[int, int]:
    """Guess "in" for the highest scores and "out" for the lowest; count the right ones.

    Args:
        scores: of each canary: higher means more likely in.
        planted: whether it was in.
        share: of the canaries that are guessed about, half at each end; fixed before looking.

    Returns:
        (guesses, right).

    Raises:
        AuditError: if there are too few canaries for one guess at each end.
    """
    each = int(share * len(scores) / 2)
    if scores.shape != planted.shape or each < 1:
        raise AuditError(
            f"{len(scores)} canaries with share={share} leave no guess: plant more canaries"
        )
    order = np.argsort(scores, kind="stable")
    out, inside = order[:each], order[-each:]
    return 2 * each, int((~planted[out]).sum() + planted[inside].sum())
