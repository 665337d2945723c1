"""Is a release worse on devices? A test that may be looked at after every report.

Each device says how far its accuracy fell with the release. A fall is clipped to ``[-clip, clip]``
and scaled to x in [0, 1]; the hypothesis is that the mean fall of honest devices is at most the
tolerance, that is E[x] <= m. Against it we bet: with a stake L in (0, 1/m) a capital of one becomes
the product of 1 + L (x - m), which cannot grow in the mean while the hypothesis holds. So (Ville)
the chance that it **ever** reaches 1/alpha is at most alpha, whenever one looks and stops:
I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B
86(1), 2024, sections 3 and 4 (the capital process), here with a mixture over fixed stakes. A
mixture of fixed stakes does not depend on the order of the reports, so nothing but the reports
themselves has to survive a kill.

**Liars.** Of n devices reached, k = floor(share * n) may say anything, at any time. The k reports
that speak most for the claim are left out, and the capital must reach 1 + 1/alpha. Then

* liars cannot make the claim: what is left is, value by value, at most the honest k-trimmed
  reports, and leaving out the largest factors of a product brings it above neither the honest
  product nor one; so its capital is at most 1 + the honest capital, which stays below 1/alpha with
  probability 1 - alpha;
* liars cannot hide it beyond a band: with k liars saying the opposite extreme, the mean of what is
  left is still at least fall - :func:`blind_band`, so a release whose mean clipped fall exceeds the
  tolerance by more than that band is found as reports come in.

What is assumed: the clipped fall of an honest device has, given what was reported before, a mean of
at most the tolerance. That holds where devices are reached in an order of their own hash buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Shares of the largest stake, 1/m; small ones for a long small fall, large ones for a quick one.
STAKES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16)


@dataclass(frozen=True)
class Evidence:
    """What the reports say about one claim.

    Attributes:
        devices: reports that were looked at.
        trimmed: reports that were left out, since so many could be lies.
        mean: of the clipped values that were looked at; 0 without any.
        capital: what a bet against the opposite of the claim has become of 1.
        needed: capital that makes the claim; infinite while nothing could.
    """

    devices: int
    trimmed: int
    mean: float
    capital: float
    needed: float

    @property
    def shown(self) -> bool:
        """Whether the claim is made."""
        return self.capital >= self.needed


def fall_shown(
    falls: Sequence[float], *, above: float, clip: float, liars: int, alpha: float
) -> Evidence:
    """Whether the mean fall of honest devices exceeds ``above``.

    Args:
        falls: of accuracy, before minus after, one for each device; 0.01 is one point.
        above: the tolerance; -clip < above < clip.
        clip: larger falls and gains count as much as this, above 0.
        liars: how many of the devices may lie.
        alpha: chance of a wrong claim, ever; above 0 and below 1.

    >>> fall_shown([0.1] * 12, above=0.02, clip=0.1, liars=0, alpha=0.05).shown
    True
    >>> fall_shown([0.02] * 10_000, above=0.02, clip=0.1, liars=0, alpha=0.05).shown
    False
    """
    kept = sorted(max(-clip, min(clip, fall)) for fall in falls)
    kept = kept[: max(0, len(kept) - liars)]
    bound = (above + clip) / (2 * clip)
    capital = _capital([(fall + clip) / (2 * clip) for fall in kept], bound)
    needed = 1 / alpha + (1 if liars else 0)
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    return Evidence(len(kept), len(falls) - len(kept), mean, capital, needed)


def no_fall_shown(
    falls: Sequence[float], *, below: float, clip: float, liars: int, alpha: float
) -> Evidence:
    """Whether the mean fall of honest devices stays below ``below``: the mirrored claim.

    >>> no_fall_shown([0.0] * 40, below=0.05, clip=0.1, liars=0, alpha=0.05).shown
    True
    """
    mirrored = fall_shown(
        [-fall for fall in falls], above=-below, clip=clip, liars=liars, alpha=alpha
    )
    return Evidence(
        mirrored.devices, mirrored.trimmed, -mirrored.mean, mirrored.capital, mirrored.needed
    )


def blind_band(clip: float, liar_share: float) -> float:
    """How far beyond the tolerance a fall may lie and yet be hidden by that share of liars.

    >>> round(blind_band(0.1, 0.05), 4)
    0.0105
    """
    return 2 * liar_share * clip / (1 - liar_share)


def _capital(values: Sequence[float], bound: float) -> float:
    """The mean of the capitals of all stakes, from values in [0, 1]; by logarithms."""
    capitals = []
    for share in STAKES:
        stake = share / bound
        grown = math.fsum(math.log1p(stake * (value - bound)) for value in values)
        capitals.append(math.exp(min(grown, 600.0)))  # beyond that it is shown anyhow
    return math.fsum(capitals) / len(capitals)
