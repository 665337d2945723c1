"""The private pieces of client-level privacy: noise on a clipped sum, by the server.

What they do to a sum is in :mod:`aggregation.clipped_sum`; what they cost, in ``privacy.central``,
which also makes them: a piece by itself says how much noise there is, and nobody counts it.

    >>> str(ClientDp(clip=0.5, noise_multiplier=2.0, cohort=20.0))
    'client-dp(clip=0.5, noise_multiplier=2, cohort=20)'
    >>> round(ClientDp(noise_multiplier=1.0, quantile=0.5, cohort=100.0).multiplier, 3)
    1.005
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aggregation.clipped_sum import CLIP, ClippedSum, Noise, Release, VectorSum
from aggregation.errors import RecipeError
from aggregation.parcel_keys import sent_keys, sizes
from aggregation.piece import Piece
from aggregation.reducing import Accumulator
from aggregation.state import GlobalState
from aggregation.train import Assignment

_WIDEST = 1e9  # an adaptive clip stays within this factor of where it began
MOST_NOISE = 1e4  # multiplier: what the grid of the sum has room for
MOST_COUNT_NOISE = 1e5
MOST_CLIENTS = 1 << 20


@dataclass(frozen=True)
class CentralPiece(Piece):
    """Base of the pieces that noise a sum of clipped updates.

    Attributes:
        clip: C, the Euclidean norm to which each client's transmitted vector is scaled down.
        noise_multiplier: z; above 0.
        cohort: expected number of clients in a round, by which the sum is divided whoever came.
    """

    central = True
    secure = False
    warning = ""
    clip: float = 1.0
    noise_multiplier: float = 1.0
    cohort: float = 1.0

    def __post_init__(self) -> None:
        _within(self.kind, "clip", self.clip, 1e-9, 1e9, "usual: the median norm of an update")
        _within(
            self.kind,
            "noise_multiplier",
            self.noise_multiplier,
            1e-9,
            MOST_NOISE,
            "choose private=none for no noise at all",
        )
        _within(self.kind, "cohort", self.cohort, 1e-9, MOST_CLIENTS, "it is a number of clients")

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise on the sum of vectors, over the clip."""
        return self.noise_multiplier

    def open(self, state: GlobalState, assignment: Assignment, noise: Noise | None) -> Accumulator:
        """A new sum for one round.

        Args:
            state: after the last round.
            assignment: of the round's clients: says which tensors they send.
            noise: where noise comes from, for what it costs.

        Raises:
            RecipeError: without noise.
        """
        spec = state.adapter.spec
        keys = sent_keys(spec, assignment)
        about = f"{state.adapter.digest} {' '.join(keys)}"
        size = sum(sizes(keys, spec))
        return ClippedSum(
            spec,
            keys,
            VectorSum(size, self.release(state), state.round + 1, self.counted(noise), about),
            self.adapt(state),
        )

    def counted(self, noise: Noise | None) -> Noise:
        """The same, if there is one.

        Raises:
            RecipeError: if there is none.
        """
        if noise is None:
            raise RecipeError(
                f"private={self} adds noise that somebody has to count: begin with noise=..., as "
                "privacy.cohort_account gives it (a scenario has [client_privacy] for it)"
            )
        return noise

    def release(self, state: GlobalState) -> Release:
        """Clip, noise and divisor of the next round."""
        return Release(self.clip, self.multiplier, self.cohort)

    def adapt(self, state: GlobalState) -> Callable[[float], float] | None:
        """How the clip moves after the next round; None if it stays."""
        return None


@dataclass(frozen=True)
class ClientDp(CentralPiece):
    """Private: every client's update is clipped, and the server noises their sum (DP-FedAvg).

    McMahan et al. 2018 (1710.06963), algorithm 1, with the clip over the whole transmitted vector
    (their "flat" clipping) and the fixed divisor. The noise of a round has standard deviation
    ``noise_multiplier * clip`` on the sum.

    With ``quantile``, the clip follows that quantile of the updates' norms (Andrew et al. 2021,
    1905.03871, algorithm 1): with b the noisy share of updates within the clip,

        clip <- clip exp(-clip_rate (b - quantile)).

    The share is released with noise of its own, of standard deviation ``count_noise`` on the sum of
    ``b_k - 1/2``, which one client moves by 1/2. To the vector, scaled by the clip, it is one
    coordinate more: both together are one Gaussian mechanism of ``noise_multiplier`` z if the
    vector has the larger multiplier ``(z^-2 - (2 count_noise)^-2)^(-1/2)`` (their theorem 1). So
    one event covers both, and it does not say less than it should.

    Attributes:
        clip: C, the Euclidean norm to which each client's transmitted vector is scaled down; with
            ``quantile``, that of the first round.
        noise_multiplier: z, of the round as a whole; above 0.
        cohort: expected number of clients in a round, by which the sum is divided whoever came.
        quantile: share of the updates that should be within the clip; None keeps it where it is.
        clip_rate: how fast the clip follows; 0.2 in the paper.
        count_noise: standard deviation of the noise on the number of updates within the clip; by
            default a twentieth of the cohort, as there, and in small cohorts ``noise_multiplier``,
            which makes the vector's noise larger by 15 %.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "client-dp"
    quantile: float | None = None
    clip_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self.kind, "clip_rate", self.clip_rate, 1e-6, 10.0, "0.2 is the paper's")
        if self.quantile is not None:
            _within(self.kind, "quantile", self.quantile, 0.01, 0.99, "0.5 is the paper's")
        if self.count_noise is not None:
            _within(self.kind, "count_noise", self.count_noise, 1e-9, MOST_COUNT_NOISE, "leave out")
        if 2.0 * self.count_std <= self.noise_multiplier:
            raise RecipeError(
                f"{self.kind}: count_noise={self.count_std:g} must be above half of "
                f"noise_multiplier={self.noise_multiplier:g}: the count alone would spend more "
                "than both together may; leave it out"
            )

    @property
    def count_std(self) -> float:
        """Standard deviation of the noise on the number of updates within the clip."""
        if self.count_noise is not None:
            return self.count_noise
        return max(self.cohort / 20.0, self.noise_multiplier)

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise on the sum of vectors, over the clip."""
        z = self.noise_multiplier
        if self.quantile is None:
            return z
        return float((z**-2 - (2.0 * self.count_std) ** -2) ** -0.5)

    def release(self, state: GlobalState) -> Release:
        """Clip, noise and divisor of the next round, after the rounds so far."""
        if self.quantile is None:
            return super().release(state)
        return Release(self._clip(state), self.multiplier, self.cohort, self.count_std)

    def adapt(self, state: GlobalState) -> Callable[[float], float] | None:
        """How the clip moves after the next round; None if it stays."""
        return None if self.quantile is None else partial(self.next_clip, self._clip(state))

    def _clip(self, state: GlobalState) -> float:
        return float(state.buffers[CLIP][0]) if CLIP in state.buffers else self.clip

    def next_clip(self, clip: float, share: float) -> float:
        """The clip of the next round.

        Args:
            clip: of this one.
            share: noisy share of the updates that were within it; may lie outside 0 to 1.
        """
        if self.quantile is None:
            return clip
        power = -self.clip_rate * (share - self.quantile)
        moved = clip * math.exp(min(max(power, -20.0), 20.0))
        return min(max(moved, self.clip / _WIDEST), self.clip * _WIDEST)


@dataclass(frozen=True)
class ClientDpFtrl(CentralPiece):
    """Private: as client-dp, with noise that later rounds take back (DP-FTRL).

    Kairouz et al. 2021 (2103.00039), with the tree of Dwork et al. 2010 and Chan et al. 2011. What
    matters to the model is the sum of all rounds so far. Every such sum is put together from
    partial sums, of 1, 2, 4, ... rounds each, and each of those has noise of its own, of standard
    deviation ``noise_multiplier * clip``: the sum of t rounds carries the noise of at most
    ``log2 t + 1`` partial sums, where client-dp would add t. A round releases the difference, the
    noise of its prefix minus that of the one before. It needs no sampling, and earns nothing from
    it: it is for cohorts that nobody draws, such as devices that come when they can.

    What it costs depends on how often a client takes part, and how close together: both are limited
    by whoever draws the cohorts, and counted in ``privacy.tree_noise``.

    Attributes:
        clip: C, the Euclidean norm to which each client's transmitted vector is scaled down.
        noise_multiplier: standard deviation of the noise of each partial sum, over ``clip``.
        cohort: expected number of clients in a round, by which the sum is divided whoever came.
        separation: a client takes part at most once in so many consecutive rounds.
        participations: most rounds of a tree that a client takes part in.
        restart: rounds of a tree, after which a new one begins; 0 for one over the whole run.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "client-dp-ftrl"
    separation: int = 1
    participations: int = 1
    restart: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("separation", 1), ("participations", 1), ("restart", 0)):
            value = getattr(self, name)
            if not least <= value <= 100_000:
                raise RecipeError(
                    f"{self.kind}: {name}={value} must be a whole number of {least} to 100000"
                )


def _within(kind: str, name: str, value: float, least: float, most: float, usual: str) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise RecipeError(f"{kind}: {name}={value:g} must lie in {least:g}..{most:g}; {usual}")
