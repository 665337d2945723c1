"""Audits: a lower bound on epsilon that is measured, beside the upper bound that is claimed.

    canaries = GradientCanaries(Canaries(5000, event, key))       # or audit_central.audit
    train(planted=canaries)                                       # one training, as it always is
    result = judge(canaries.canaries, claimed=8.0, delta=1e-5, mechanism="local")
    result.measured, result.broken

This is the one-run audit of Steinke, Nasr and Jagielski 2023 (2305.08846). Canaries are put in or
left out by coins, the mechanism runs once, and whoever sees all that it releases, and knows all
but the coins, guesses them. If the mechanism is (epsilon, delta)-private there is a limit to how
many guesses are right (theorem 5.2), and more right guesses refute the claim. So

* a lower bound *above* the claim is a proof, at its confidence, that the mechanism is broken;
* a lower bound *below* the claim proves nothing: it is what this one attack could show.

How many guesses to make has to be fixed beforehand, and no number is best for all: every canary
for a mechanism that protects nothing, the twentieth that stands out most for one that works. Both
are made, and the confidence is divided between them (Bonferroni), so that the better one holds.

The bound has a ceiling. With delta, the theorem refutes no epsilon beyond log(risk / (2 delta)),
and e^epsilon canaries are needed besides. Above it, :attr:`Audit.refutable` is false, and two
plainer things still tell a mechanism that does not do what it says: the noise that is read where no
canary is, and how far one canary moves a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from privacy.audit_bound import AuditError, guess, lower_bound, p_value, widest_gap
from privacy.audit_canaries import Canaries

__all__ = [
    "CONFIDENCE",
    "Audit",
    "AuditError",
    "canaries_for",
    "ceiling",
    "check_claim",
    "judge",
    "most",
    "refutable",
]

SHARES = (1.0, 0.05)  # of the canaries that are guessed about
CONFIDENCE = 0.95
USUAL = 5000  # canaries, where a smaller number could refute the claim too
MOST = 100_000
SLACK, ERRORS = 0.01, 4.0  # by how much noise and reach may be off before they are a fault


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit has found.

    Attributes:
        mechanism: what was audited: ``local`` or ``central``.
        claimed: the epsilon that is promised; an upper bound.
        delta: at which.
        measured: the epsilon that was shown; a lower bound.
        confidence: probability with which a claim that is true survives.
        canaries: how many coins were flipped.
        planted: how many canaries were in.
        guesses: how many guesses the bound rests on.
        right: how many of them were right.
        steps: of the mechanism, that were seen.
        refutable: whether the claim would have been refuted had every guess been right.
        noise_claimed: standard deviation of the noise over the clip, as claimed.
        noise_seen: the same, as read where no canary is.
        reach_seen: by how many clips one canary moves the sum of a step; at most 1 is claimed.
        faults: why the mechanism is broken, in words; empty if nothing was found.
    """

    mechanism: str
    claimed: float
    delta: float
    measured: float
    confidence: float
    canaries: int
    planted: int
    guesses: int
    right: int
    steps: int
    refutable: bool
    noise_claimed: float
    noise_seen: float
    reach_seen: float
    faults: tuple[str, ...]

    @property
    def broken(self) -> bool:
        """Whether the mechanism gives away more than it promises, or is not what it says."""
        return bool(self.faults)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "faults": list(self.faults), "broken": self.broken}


def judge(
    canaries: Canaries,
    *,
    claimed: float,
    delta: float,
    mechanism: str,
    confidence: float = CONFIDENCE,
) -> Audit:
    """Guess the coins, and bound epsilon from below.

    Args:
        canaries: after the mechanism has run.
        claimed: the epsilon that is promised for the run.
        delta: at which.
        mechanism: what was audited, for the record.
        confidence: with which the bound is to hold; above 0 and below 1.

    Raises:
        AuditError: if no step was seen, or an argument is out of its bounds.
    """
    check_claim(claimed, delta, confidence)
    if not canaries.steps:
        raise AuditError("the mechanism has released nothing: run it with the canaries first")
    count, best = len(canaries), (-1.0, 0, 0)
    for share in SHARES:
        centre = widest_gap(canaries.scores) if share == 1.0 else 0.0
        guesses, right = guess(canaries.scores, canaries.planted, share, centre)
        bound = lower_bound(
            canaries=count,
            guesses=guesses,
            right=right,
            delta=delta,
            confidence=_each(confidence),
        )
        best = max(best, (bound, guesses, right), key=lambda found: found[0])
    return Audit(
        mechanism=mechanism,
        claimed=claimed,
        delta=delta,
        measured=best[0],
        confidence=confidence,
        canaries=count,
        planted=int(canaries.planted.sum()),
        guesses=best[1],
        right=best[2],
        steps=canaries.steps,
        refutable=refutable(count, claimed, delta, confidence),
        noise_claimed=canaries.event.noise_multiplier,
        noise_seen=canaries.noise_seen()[0],
        reach_seen=canaries.reach_seen()[0],
        faults=tuple(_faults(canaries, best[0], claimed)),
    )


def refutable(canaries: int, claimed: float, delta: float, confidence: float = CONFIDENCE) -> bool:
    """Whether so many canaries refute a claim if every single guess is right."""
    check_claim(claimed, delta, confidence)
    counts = {int(share * canaries) for share in SHARES} - {0}
    return any(
        p_value(canaries=canaries, guesses=n, right=n, epsilon=claimed, delta=delta)
        < 1.0 - _each(confidence)
        for n in counts
    )


def canaries_for(
    claimed: float, delta: float, confidence: float = CONFIDENCE, most: int = MOST
) -> int:
    """How many canaries to plant: the usual number, or more if a high claim needs it.

    Against an epsilon of 8, even thousands of guesses that are all right are not yet a proof: one
    in e^8 may be wrong. Where no number up to ``most`` would do, it is the usual one, and
    :attr:`Audit.refutable` says so.

    >>> canaries_for(1.0, 1e-5), canaries_for(8.0, 1e-7) > 10_000
    (5000, True)

    Args:
        claimed: the epsilon that is promised.
        delta: at which.
        confidence: of the bound.
        most: how many there is room for: one for each parameter that trains.
    """
    count = least = min(USUAL, most)
    while not refutable(count, claimed * 1.02, delta, confidence):
        if count >= most:
            return least
        count = min(most, math.ceil(count * 1.2))
    return count


def most(canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The lower bound that so many canaries give if every single guess is right."""
    return max(
        lower_bound(
            canaries=canaries, guesses=n, right=n, delta=delta, confidence=_each(confidence)
        )
        for n in (int(share * canaries) for share in SHARES)
    )


def ceiling(delta: float, confidence: float = CONFIDENCE) -> float:
    """The epsilon that no number of canaries refutes at this delta.

    >>> round(ceiling(1e-5), 1), round(ceiling(1e-7), 1)
    (7.1, 11.7)
    """
    return math.log((1.0 - _each(confidence)) / (2.0 * delta))


def _faults(canaries: Canaries, measured: float, claimed: float) -> Iterator[str]:
    if measured > claimed:
        yield f"it gives away an epsilon of at least {measured:.4g}, and promises {claimed:.4g}"
    claim = canaries.event.noise_multiplier
    noise, error = canaries.noise_seen()
    if noise < (1.0 - SLACK) * claim - ERRORS * error:
        yield f"its noise is {noise:.4g} times the clip, and {claim:.4g} is claimed"
    reach, error = canaries.reach_seen()
    if reach > 1.0 + SLACK + ERRORS * error:
        yield f"one canary moves a sum by {reach:.4g} times the clip, and at most 1 is claimed"


def _each(confidence: float) -> float:
    return 1.0 - (1.0 - confidence) / len(SHARES)


def check_claim(claimed: float, delta: float, confidence: float) -> None:
    """Refuse to audit what promises nothing.

    Raises:
        AuditError: naming what is out of its bounds.
    """
    if not (math.isfinite(claimed) and claimed > 0):
        raise AuditError(
            f"a claimed epsilon of {claimed:g} promises nothing that could be audited: it must be "
            "a number above 0, so use noise"
        )
    if not 0 < delta < 1:
        raise AuditError(f"delta={delta} must be above 0 and below 1")
    if not 0 < confidence < 1:
        raise AuditError(f"confidence={confidence} must be above 0 and below 1; usual is 0.95")
