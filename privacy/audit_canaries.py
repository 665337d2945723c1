"""Canaries of an audit: who is in, where each one points, and how likely each looks to be in.

    >>> from privacy.randomness import seeded_key
    >>> event = SgdEvent(noise_multiplier=1.0, sample_rate=0.5, steps=3, max_grad_norm=1.0)
    >>> canaries = Canaries(100, event, seeded_key(1))
    >>> canaries.point(np.ones(1000, np.bool_))
    >>> canaries.vectors(canaries.draw()[:2]).shape
    (2, 1000)

Every canary is a vector of ten times the clip in a direction of its own: equally long steps, up or
down at random, along its share of the coordinates, dealt out at random. No two canaries touch the
same coordinate, so none hides another, and thousands of them cost no more memory than one vector.

A fair coin puts each canary into the data or leaves it out. If it is in, every step draws it with
the sampling rate, on its own, like any real example. What the mechanism releases is then read along
each direction, and the score of a canary is the logarithm of how much likelier that reading is with
the canary in the data than without it (Neyman and Pearson 1933; the two densities are those of the
analysis of the subsampled Gaussian, Mironov et al. 2019, section 3). With a rate of 1 this is the
sum of the readings, the score of Steinke et al. 2023, section 6; with a smaller one it sees more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from privacy.audit_bound import AuditError
from privacy.events import SgdEvent
from privacy.randomness import Stream, derive

SCALE = 10.0  # norm of a canary over the clip: a clip that is left out shows at once
LEAST = 100
LEAST_NOISE = 0.05  # the score divides by the noise; without any, whoever is in stands out anyway
BLOCK = 1 << 22  # numbers in memory at once, of canaries that are drawn

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


class Canaries:
    """The canaries of one audit.

    Args:
        count: how many coins are flipped.
        event: the mechanism as it is claimed to be: noise, sampling rate, clip.
        key: root of the coins, the sampling and the directions.
        progress: called after every step with the number of steps so far.

    Raises:
        AuditError: if there are too few.
    """

    def __init__(
        self,
        count: int,
        event: SgdEvent,
        key: bytes,
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        if count < LEAST:
            raise AuditError(f"{count} canaries show nothing: plant at least {LEAST}")
        self.event = event
        self.planted: Mask = Stream(derive(key, "coins")).uniform(count) < 0.5
        self.scores: Floats = np.zeros(count)
        self.steps = 0
        self._drawn: Indices = np.zeros(0, np.int64)
        self._quiet = self._reach = 0.0  # sums over the readings of those left out, and drawn
        self._draws = 0
        self._sampling = Stream(derive(key, "sampling"))
        self._pointing = Stream(derive(key, "directions"))
        self._progress = progress
        self._trains: Mask = np.zeros(0, np.bool_)
        self._where: Indices = np.zeros((count, 0), np.int64)
        self._units: Floats = np.zeros((count, 0))

    def __len__(self) -> int:
        return len(self.planted)

    def point(self, trains: Mask) -> None:
        """Deal out the coordinates; as long as the same ones train, directions stay as they are.

        Args:
            trains: (d,), false where an entry never moves.

        Raises:
            AuditError: if there are fewer entries that train than canaries.
        """
        if np.array_equal(trains, self._trains):
            return
        free = np.flatnonzero(trains)
        each = len(free) // len(self)
        if not each:
            raise AuditError(
                f"{len(self)} canaries need a coordinate each, and only {len(free)} parameters "
                f"train: plant at most {len(free)}, or train more"
            )
        dealt = free[self._pointing.permutation(len(free))[: each * len(self)]]
        self._where = dealt.reshape(len(self), each)
        signs = np.where(self._pointing.uniform(dealt.size) < 0.5, -1.0, 1.0)
        self._units = signs.reshape(len(self), each) / math.sqrt(each)
        self._trains = trains.copy()

    def draw(self) -> Indices:
        """Those that are in the data and that the next step draws."""
        drawn = self._sampling.uniform(len(self)) < self.event.sample_rate
        self._drawn = np.flatnonzero(self.planted & drawn)
        return self._drawn

    def blocks(self, drawn: Indices) -> list[Indices]:
        """The same canaries, so few at a time that their vectors fit into memory."""
        size = max(1, BLOCK // max(1, len(self._trains)))
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    def vectors(self, which: Indices) -> npt.NDArray[np.float32]:
        """Their vectors, (n, d), each ``SCALE`` times as long as the clip allows."""
        found = np.zeros((len(which), len(self._trains)), np.float32)
        length = SCALE * self.event.max_grad_norm
        found[np.arange(len(which))[:, None], self._where[which]] = length * self._units[which]
        return found

    def see(self, total: npt.NDArray[np.floating]) -> None:
        """Score every canary by what a step has released.

        Args:
            total: (d,), the noisy sum; what is known of the real data may be taken off it.

        Raises:
            AuditError: if it is not finite.
        """
        if not np.isfinite(total).all():
            raise AuditError(
                f"step {self.steps + 1} released a number that is not finite: the training "
                "diverged; lower its learning rate"
            )
        along = (total[self._where] * self._units).sum(axis=1) / self.event.max_grad_norm
        self.scores += log_ratio(along, self.event.noise_multiplier, self.event.sample_rate)
        self._quiet += float((along[~self.planted] ** 2).sum())
        self._reach += float(along[self._drawn].sum())
        self._draws += len(self._drawn)
        self.steps += 1
        self._progress(self.steps)

    def noise_seen(self) -> tuple[float, float]:
        """The deviation of what is read of the canaries left out, in clips, and its error."""
        readings = max(1, self.steps * int((~self.planted).sum()))
        found = math.sqrt(self._quiet / readings)
        return found, found / math.sqrt(2.0 * readings)

    def reach_seen(self) -> tuple[float, float]:
        """By how many clips a canary moves the sum of a step that draws it, and its error."""
        draws = max(1, self._draws)
        return self._reach / draws, self.noise_seen()[0] / math.sqrt(draws)


def log_ratio(along: Floats, noise_multiplier: float, sample_rate: float) -> Floats:
    """Of readings x, log of (1 - q) N(x; 0, s) + q N(x; 1, s) over N(x; 0, s).

    >>> log_ratio(np.array([0.5, 1.5]), 1.0, 1.0).tolist()
    [0.0, 1.0]
    """
    sigma = max(noise_multiplier, LEAST_NOISE)
    out = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    inside = math.log(sample_rate) + (2.0 * along - 1.0) / (2.0 * sigma * sigma)
    ratio: Floats = np.logaddexp(out, inside)
    return ratio
