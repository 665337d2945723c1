"""Discrete Gaussian noise, sampled exactly from a ChaCha20 stream.

    >>> from privacy.randomness import Stream
    >>> drawn = discrete_gaussian(Stream(b"k" * 32), sigma=5, count=10_000)
    >>> drawn.dtype, bool(abs(float(drawn.std()) - 5.0) < 0.15)
    (dtype('int64'), True)

The discrete Gaussian of parameter sigma gives the whole number x with a probability proportional
to ``exp(-x^2 / (2 sigma^2))`` (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, definition 1).
Sampling follows Karney 2016 (arXiv:1303.6257, section 5) for a whole sigma: ``|x| = k sigma + j``
with k drawn from ``exp(-k^2 / 2)``, j uniform below sigma, and kept with probability
``exp(-j (2 k sigma + j) / (2 sigma^2))``.

**Exactly** means that no rounding has a part in it. Every decision compares a uniform number, of as
many random bits as it takes, with a real one. Sixty-four bits and a float64 decide it where they
are further apart than all rounding errors together; where they are not, once in 2^38 or so, whole
numbers of growing size do. So the distribution is the stated one, and no floating-point attack
(Mironov 2012) has anything to hold on to.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np
import numpy.typing as npt

from privacy.errors import PrivacyError
from privacy.randomness import Stream

Whole = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

MOST_SIGMA = 1 << 28  # so that j (2 k sigma + j) stays below 2^63 for all k below 64
MARGIN = 2.0**-40  # float64 is right within 2^-46 here, see _keep
_BATCH = 1 << 17
_TOP = (1 << 64) - 1


class NoiseError(PrivacyError):
    """Noise of a size that cannot be sampled."""


def discrete_gaussian(
    stream: Stream, sigma: int, count: int, *, margin: float = MARGIN
) -> npt.NDArray[np.int64]:
    """Independent discrete Gaussian numbers.

    Args:
        stream: all the randomness there is; equal streams give equal numbers.
        sigma: the parameter, a whole number from 1; the standard deviation is the same but for
            a few parts in 10^7 at sigma 1, and nothing that a float64 could tell from 4 on.
        count: how many.
        margin: how far float64 is trusted; larger ones are slower, and give the same numbers where
            the stream's words are not used up by the slow path.

    Returns:
        int64 of shape (count,).

    Raises:
        NoiseError: if sigma is out of 1..2^28.
    """
    if not 1 <= sigma <= MOST_SIGMA:
        raise NoiseError(f"discrete Gaussian noise: sigma={sigma} is not in 1..{MOST_SIGMA}")
    found: list[Whole] = []
    missing = count
    while missing > 0:
        kept = _candidates(stream, sigma, min(_BATCH, missing + missing // 2 + 16), margin)
        found.append(kept[:missing])
        missing -= kept.size
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _candidates(stream: Stream, sigma: int, tries: int, margin: float) -> Whole:
    """So many tries; those that are kept (71 %), in order."""
    first, second, third = stream.words(3 * tries).reshape(3, tries)
    places = second >> np.uint64(1)
    limit = (1 << 63) // sigma * sigma  # below it every rest is as likely as any other
    fair = places < np.uint64(limit)
    j = (places % np.uint64(sigma)).astype(np.int64)
    k = _halves(first, stream)
    size = k * sigma + j
    negative = (second & np.uint64(1)).astype(bool)
    fair &= ~(negative & (size == 0))  # zero has no sign, and must not come twice as often
    kept = _keep(third, j * (2 * k * sigma + j), 2 * sigma * sigma, stream, margin)
    chosen = fair & kept
    drawn: Whole = np.where(negative, -size, size)[chosen]
    return drawn


def _keep(words: Words, above: Whole, below: int, stream: Stream, margin: float) -> np.ndarray:
    """Whether a uniform number is below ``exp(-above / below)``, each on its own.

    The quotient is at most k + 1/2 < 64 and right within a relative 3 2^-53, so the power is right
    within 2^-46; the word as a float64 is right within 2^-53.
    """
    power = np.exp(-(above / below))
    uniform = words * 2.0**-64
    kept: np.ndarray = uniform < power
    for at in np.flatnonzero(np.abs(uniform - power) <= margin):
        number, divisor = int(above[at]), below

        def scaled(bits: int, number: int = number, divisor: int = divisor) -> int:
            return _floor(_power(number, divisor, bits), bits)

        kept[at] = _below(int(words[at]), 64, scaled, stream)
    return kept


def _halves(words: Words, stream: Stream) -> Whole:
    """For each word a k, with a probability proportional to ``exp(-k^2 / 2)``."""
    surely = np.searchsorted(_EDGES_LOW, words, side="right")
    perhaps = np.searchsorted(_EDGES_HIGH, words, side="left")
    found = surely.astype(np.int64)
    for at in np.flatnonzero(surely != perhaps):  # a word at the very edge
        k, value, bits = 0, int(words[at]), 64
        # More bits are drawn once and for all: every edge is compared with the same number.
        while True:
            value, bits = _longer(value, bits, stream)
            k = 0
            while value > (edge := _floor(_cumulative(k, bits), bits)) + 1:
                k += 1
            if abs(value - edge) > 1:
                break
        found[at] = k
    return found


def _below(value: int, bits: int, scaled: Callable[[int], int], stream: Stream) -> bool:
    """Whether a number of which these bits are known is below a real one."""
    while abs(value - (edge := scaled(bits))) <= 1:
        value, bits = _longer(value, bits, stream)
    return value < edge


def _longer(value: int, bits: int, stream: Stream) -> tuple[int, int]:
    return value << 64 | int(stream.words(1)[0]), bits + 64


def _digits(bits: int) -> int:
    return bits // 3 + 40  # decimal digits, with room for all rounding


def _power(number: int, divisor: int, bits: int) -> Decimal:
    context = Context(prec=_digits(bits))
    return context.exp(context.divide(Decimal(-number), Decimal(divisor)))


def _cumulative(k: int, bits: int) -> Decimal:
    """Probability of at most k."""
    context, last = Context(prec=_digits(bits)), 8 + 2 * int(bits**0.5) + k
    powers = [_power(i * i, 2, bits) for i in range(last)]
    total, part = Decimal(0), Decimal(0)
    for number, power in enumerate(powers):
        total = context.add(total, power)
        part = total if number == k else part
    return context.divide(part, total)


def _floor(share: Decimal, bits: int) -> int:
    context = Context(prec=_digits(bits) + bits)
    scaled = context.multiply(share, Decimal(1 << bits))
    return int(scaled.to_integral_value(ROUND_FLOOR, context))


_EDGES = [_floor(_cumulative(k, 64), 64) for k in range(10)]  # the tenth is 2^64 but for rounding
_EDGES_LOW = np.array([max(0, edge - 1) for edge in _EDGES], np.uint64)
_EDGES_HIGH = np.array([min(_TOP, edge + 1) for edge in _EDGES], np.uint64)
