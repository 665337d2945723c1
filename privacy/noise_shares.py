"""What noise in shares costs: every client adds a discrete Gaussian of its own to its vector.

    >>> closeness(sigma=0.5, shares=2) > 1e-2
    True
    >>> closeness(sigma=4.0, shares=100) < 1e-60
    True
    >>> counted_multiplier(1.0) < 1.0 < counted_multiplier(1.0) + 1e-12
    True

The sum of independent discrete Gaussians is none, but close to one: by how much is the tau of
Kairouz, Liu and Steinke 2021 (arXiv:2102.06387, theorem 1). For h shares of parameter sigma each,
vectors of d whole numbers and a Euclidean sensitivity D, adding the sum of the shares is
1/2 e^2-concentrated differentially private (zero-concentrated, Bun and Steinke 2016) with

    e = D / (sqrt(h) sigma) + tau sqrt(d),    tau = 10 sum over k = 1 .. h-1 of
                                                    exp(-2 pi^2 sigma^2 k / (k + 1)).

A Gaussian of noise multiplier 1 / e costs exactly as much, at every Renyi order, so that is the
event that is counted. Shares beyond h, of clients that came as well, are added to the result
independently of everything, and only make it noisier.
"""

from __future__ import annotations

import math

import numpy as np

from aggregation.ring import MAX_CLIENTS
from aggregation.secret_ring import LEAST_SHARE
from privacy.budget import BudgetError
from privacy.secure_session import MAX_LENGTH


def closeness(sigma: float, shares: int) -> float:
    """tau: how far the sum of shares is from a discrete Gaussian; 0 where a float64 has no less.

    Args:
        sigma: parameter of one share, in whole numbers' steps; at least 1/2.
        shares: how many are added, at least 1.

    Raises:
        BudgetError: if sigma is below what the theorem covers.
    """
    if not sigma >= 0.5:
        raise BudgetError(
            f"a share of noise has sigma={sigma:g} steps, and the bound on their sum begins at "
            "0.5: use more bits, or more noise"
        )
    k = np.arange(1.0, shares)
    return float(10.0 * np.exp(-2.0 * (math.pi * sigma) ** 2 * k / (k + 1.0)).sum())


def concentrated(sensitivity: float, sigma: float, shares: int, length: int) -> float:
    """e, of 1/2 e^2-concentrated differential privacy.

    Args:
        sensitivity: Euclidean, in whole numbers' steps.
        sigma: parameter of one share.
        shares: how many are certainly added by clients that tell nobody theirs.
        length: numbers in a vector.
    """
    spread = math.sqrt(shares) * sigma
    return sensitivity / spread + closeness(sigma, shares) * math.sqrt(length)


def counted_multiplier(multiplier: float) -> float:
    """The noise multiplier of a Gaussian that costs as much as shares do, whatever their number.

    A ring gives no share below ``LEAST_SHARE`` steps. With that, the longest vector and the most
    clients that there may be, tau sqrt(d) is below 10^-50; it is counted all the same, as the last
    bit of the multiplier.

    Args:
        multiplier: standard deviation of the shares that are counted on, over the clip.
    """
    tau = closeness(LEAST_SHARE, 2) * MAX_CLIENTS  # k / (k + 1) is least at k = 1
    exact = 1.0 / (1.0 / multiplier + tau * math.sqrt(MAX_LENGTH))
    return math.nextafter(exact, 0.0)
