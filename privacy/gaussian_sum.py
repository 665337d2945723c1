"""The mean of clients' vectors with noise on their sum: the definition of the central mechanism.

    >>> from privacy.randomness import seeded_key
    >>> noisy = GaussianSum(
    ...     size=2, clip=1.0, noise_multiplier=0.0, denominator=2.0, noise=Stream(seeded_key(1))
    ... )
    >>> noisy.release([np.array([0.0, 0.5]), np.array([3.0, 4.0])]).round(9).tolist()
    [0.3, 0.65]

DP-FedAvg with a fixed denominator (McMahan et al. 2018, 1710.06963, section 3): each vector is
scaled down to a Euclidean norm of ``clip``, the sum gets Gaussian noise of ``noise_multiplier``
times that, and is divided by a number that does not depend on who came. With every client drawn on
its own with rate q, T rounds are T steps of :class:`privacy.events.SgdEvent`, with clients in the
place of examples: one client added or removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy.budget import BudgetError
from privacy.randomness import Stream

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GaussianSum:
    """Clip, sum, noise, divide.

    Attributes:
        size: length of a vector; at least 1.
        clip: largest Euclidean norm with which a vector enters; above 0.
        noise_multiplier: standard deviation of the noise over ``clip``; at least 0.
        denominator: the expected number of clients in a round; above 0, and public.
        noise: where the noise comes from.

    Raises:
        BudgetError: if a value is out of its bounds.
    """

    size: int
    clip: float
    noise_multiplier: float
    denominator: float
    noise: Stream

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise BudgetError(f"size={self.size!r} must be a whole number of at least 1")
        for name in ("clip", "denominator"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise BudgetError(f"{name}={value} must be above 0")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise BudgetError(f"noise_multiplier={self.noise_multiplier} must be at least 0")

    def release(self, vectors: Iterable[npt.NDArray[np.floating]]) -> Floats:
        """The noisy mean of a round.

        Args:
            vectors: of the clients that were drawn, each of shape (size,); none is a round too.

        Raises:
            BudgetError: if one has another length.
        """
        total = np.zeros(self.size)
        for vector in vectors:
            if vector.shape != total.shape:
                raise BudgetError(f"a vector has shape {vector.shape}, expected {total.shape}")
            total += self._clipped(vector)
        total += self.noise_multiplier * self.clip * self.noise.normal(self.size)
        return total / self.denominator

    def _clipped(self, vector: npt.NDArray[np.floating]) -> Floats:
        """At most ``clip`` long, whatever comes: a vector that is not finite counts as zero."""
        exact = vector.astype(np.float64)
        largest = float(np.abs(exact).max(initial=0.0))
        if not math.isfinite(largest):
            return np.zeros_like(exact)
        if largest:
            norm = largest * float(np.linalg.norm(exact / largest))  # squares do not overflow
            exact *= min(1.0, self.clip / norm)
        return exact
