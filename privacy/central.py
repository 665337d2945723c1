"""Client-level privacy: what a run promises about everything of one client, and what it costs.

    >>> central = CentralPrivacy(delta=1e-5, noise_multiplier=1.0, rounds=50, clients=1000,
    ...                          fraction=0.05, sampling="poisson")
    >>> central.cohort, central.event(1).sample_rate
    (50.0, 0.05)
    >>> str(central.piece())
    'client-dp(cohort=50)'

One frozen value holds the clip, the noise, the divisor, the way cohorts are drawn and the number of
rounds; the piece that noises the sum and the events that are counted both come out of it, so they
cannot disagree. The server adds the noise: it has to be trusted with the updates, unless a secure
sum hides them from it; or the clients add it, in shares, and the server never has a sum without.

**Sampling.** Where every client is drawn by a coin of its own (``sampling="poisson"``), nobody but
the server knowing how it fell, a round costs what a Poisson-sampled Gaussian costs (Abadi et al.
2016; Mironov et al. 2019, 1908.10530). Any other way of drawing earns nothing: a client is counted
as if it took part in every round. With a fixed number drawn from more, taking a client out of the
federation would put another in its place; what is promised there is about its update: it is in
the sum, or nothing is in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from aggregation.client_dp import CentralPiece, ClientDp, ClientDpFtrl
from aggregation.errors import RecipeError
from aggregation.secure_pieces import SecureClientDdp
from privacy.budget import (
    Accountant,
    BudgetError,
    PrivacyBudget,
    Unit,
    check_accountant,
    check_delta,
    check_epsilon,
)
from privacy.central_checks import check_mechanism
from privacy.events import CohortEvent
from privacy.noise_shares import counted_multiplier
from privacy.tree_noise import sensitivity

SAMPLINGS = ("fixed", "poisson")


@dataclass(frozen=True, kw_only=True)
class CentralPrivacy:
    """What a run promises about one client: the whole bundle.

    Attributes:
        rounds: of the run.
        clients: how many there are.
        fraction: share of them that a round asks, above 0 and at most 1.
        sampling: ``poisson``, a coin for each client, or ``fixed``.
        delta: at most 1 / ``clients``.
        epsilon: what the whole run may spend, or None.
        noise_multiplier: noise over clip, or None to have it calibrated to ``epsilon``; of ``tree``
            that of each partial sum.
        clip: Euclidean norm to which what a client transmits is scaled down.
        quantile: the share of updates that should be within the clip, which then follows them; None
            for a fixed clip.
        clip_rate: how fast it follows.
        count_noise: see :class:`aggregation.client_dp.ClientDp`.
        mechanism: ``gaussian``; ``tree`` (DP-FTRL), for cohorts that nobody draws; or
            ``distributed``: noise in shares that the clients add before a secure sum.
        separation: of ``tree``: a client takes part at most once in so many consecutive rounds.
        participations: of ``tree``: most rounds of a tree in which a client takes part; None for as
            many as the separation has room for.
        restart: of ``tree``: rounds of a tree; 0 for one over the whole run.
        accountant: how epsilon is computed, both for calibrating and for reporting.

    Raises:
        BudgetError: if a value is out of its bounds or two contradict each other.
    """

    rounds: int
    clients: int
    fraction: float = 1.0
    sampling: str = "fixed"
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    clip: float = 1.0
    quantile: float | None = None
    clip_rate: float = 0.2
    count_noise: float | None = None
    mechanism: str = "gaussian"
    separation: int = 1
    participations: int | None = None
    restart: int = 0
    accountant: Accountant = Accountant.RDP

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.delta * self.clients > 1:
            raise BudgetError(
                f"client privacy: delta={self.delta:g} is above 1/n = {1 / self.clients:.3g} for "
                f"n = {self.clients} clients, so giving away everything of one client would pass "
                f"for private: choose {0.1 / self.clients:.1g} or less"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise BudgetError("client privacy: give epsilon, or noise_multiplier, or both")
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        if self.noise_multiplier is not None and not self.noise_multiplier > 0:
            raise BudgetError(
                f"client privacy: noise_multiplier={self.noise_multiplier:g} must be above 0: "
                "without noise nothing is promised; leave client privacy out for none"
            )
        if self.sampling not in SAMPLINGS:
            raise BudgetError(f"sampling={self.sampling!r} is not {' or '.join(SAMPLINGS)}")
        if not 0 < self.fraction <= 1:
            raise BudgetError(f"fraction={self.fraction} must be above 0 and at most 1")
        object.__setattr__(self, "accountant", check_accountant(self.accountant))
        check_mechanism(self)
        try:
            self._piece(self.noise_multiplier or 1.0)
        except RecipeError as error:
            raise BudgetError(f"client privacy: {error}") from None

    @property
    def cohort(self) -> float:
        """Expected number of clients in a round, by which sums are divided; public."""
        if self.sampling == "poisson":
            return self.fraction * self.clients
        return float(math.ceil(self.fraction * self.clients - 1e-9))

    @property
    def sample_rate(self) -> float:
        """Probability with which a client is drawn, where that earns amplification; else 1."""
        return self.fraction if self.sampling == "poisson" else 1.0

    @property
    def tree_rounds(self) -> int:
        """Rounds of a tree."""
        return min(self.restart or self.rounds, self.rounds)

    @property
    def most_participations(self) -> int:
        """Most rounds of a tree in which a client takes part."""
        room = math.ceil(self.tree_rounds / self.separation)
        return min(room, self.participations or room)

    @property
    def sensitivity(self) -> float:
        """How far one client moves what is released once, over the clip: 1, or that of a tree."""
        if self.mechanism != "tree":
            return 1.0
        return sensitivity(
            rounds=self.tree_rounds,
            participations=self.most_participations,
            separation=self.separation,
        )

    def spends(self, rounds: int) -> int:
        """How often a run of so many rounds spends: in each one, or once for each tree."""
        return math.ceil(rounds / self.tree_rounds) if self.mechanism == "tree" else rounds

    def noise(self) -> float:
        """The noise multiplier, calibrated to epsilon if it was not given.

        Raises:
            CalibrationError: if no noise reaches the epsilon.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        from privacy import calibration

        assert self.epsilon is not None  # noqa: S101 - one of the two is there
        least = calibration.noise_multiplier(
            self.epsilon, self.delta, self.sample_rate, self.spends(self.rounds), self.accountant
        )
        noise = least * self.sensitivity
        while self._counted(noise) < least:  # rounding must not take anything off it
            noise = math.nextafter(noise, math.inf)
        return noise

    def _counted(self, noise: float) -> float:
        """The noise multiplier of the Gaussian that costs as much."""
        if self.mechanism == "distributed":
            return counted_multiplier(noise)
        return noise / self.sensitivity

    def calibrated(self) -> CentralPrivacy:
        """The same with the noise that it comes to.

        Raises:
            CalibrationError: if no noise reaches the epsilon.
            BudgetError: if both were given, and the run would spend more than epsilon.
        """
        known = replace(self, noise_multiplier=self.noise())
        if self.epsilon is not None:
            spent = known.epsilon_after(self.rounds)
            if spent > self.epsilon:
                fit = known.rounds_within(self.epsilon)
                rounds = f"train for {fit} rounds at most" if fit else "draw fewer clients"
                raise BudgetError(
                    f"client privacy: noise_multiplier={known.noise_multiplier:g} brings epsilon "
                    f"to {spent:.3f} in {self.rounds} rounds, above {self.epsilon:g}: leave "
                    f"noise_multiplier out, and it is calibrated, or {rounds}"
                )
        return known

    def event(self, steps: int = 1) -> CohortEvent:
        """What a round spends; of ``tree`` with 0 steps what a further round of a tree does."""
        return CohortEvent(
            noise_multiplier=self._counted(self.noise()),
            sample_rate=self.sample_rate,
            steps=steps,
            clip=self.clip,
            mechanism=self.mechanism,
        )

    def epsilon_after(self, rounds: int) -> float:
        """Epsilon of the first rounds of the run; 0 for none."""
        from privacy import calibration

        if not rounds:
            return 0.0
        return calibration.epsilon([self.event(self.spends(rounds))], self.delta, self.accountant)

    def rounds_within(self, epsilon: float) -> int:
        """How many rounds of this noise an epsilon pays for."""
        from privacy.planning import rounds_left

        fit = rounds_left([], self.event(), epsilon, self.delta, self.accountant)
        return fit * self.tree_rounds if self.mechanism == "tree" else fit

    def budget(self) -> PrivacyBudget | None:
        """What the server's ledger may reach, or None if only the noise is prescribed."""
        if self.epsilon is None:
            return None
        return PrivacyBudget(self.epsilon, self.delta, Unit.CLIENT)

    def piece(self) -> CentralPiece:
        """The piece of a recipe that does it.

        Raises:
            CalibrationError: if no noise reaches the epsilon.
        """
        return self._piece(self.noise())

    def _piece(self, noise: float) -> CentralPiece:
        common: dict[str, Any] = {"clip": self.clip, "cohort": self.cohort}
        common["noise_multiplier"] = noise
        if self.mechanism == "gaussian":
            return ClientDp(
                **common,
                quantile=self.quantile,
                clip_rate=self.clip_rate,
                count_noise=self.count_noise,
            )
        if self.mechanism == "distributed":
            return SecureClientDdp(**common)
        return ClientDpFtrl(
            **common,
            separation=self.separation,
            participations=self.most_participations,
            restart=self.restart,
        )
