"""The section ``[client_privacy]`` of a scenario: what is promised to every client as a whole."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from privacy.budget import BudgetError
from privacy.central import CentralPrivacy
from simulations.settings import Federation, Section


class ClientPrivacy(Section):
    """Differential privacy of whole clients: clipped updates, and noise on their sum.

    Attributes:
        epsilon: budget of every client over the whole run; the noise is calibrated to it.
        noise_multiplier: the noise itself, over the clip; with a budget, it must keep within it.
        delta: of the guarantee; at most one over the number of clients.
        clip: Euclidean norm to which what a client sends in a round is scaled down.
        quantile: share of the updates that should be within the clip, which then follows them.
        clip_rate: how fast it follows.
        count_noise: noise on the number of updates within the clip; by default what fits the
            cohort.
        mechanism: ``gaussian``, which earns amplification where federation.sampling is
            ``poisson``; ``tree`` (DP-FTRL) for cohorts that nobody draws; or ``distributed``:
            noise in shares that the clients add before a secure sum (``private = "secure-sum"``).
        separation: of ``tree``: a client takes part at most once in so many consecutive rounds.
        participations: of ``tree``: most rounds of a tree in which a client takes part.
        restart: of ``tree``: rounds of a tree; 0 for one over the whole run.
        accountant: how epsilon is computed: ``rdp`` (a safe bound) or ``pld`` (tight and slow).
    """

    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0, le=1000)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    quantile: Annotated[float, Field(ge=0.01, le=0.99)] | None = None
    clip_rate: Annotated[float, Field(gt=0, le=10)] = 0.2
    count_noise: Annotated[float, Field(gt=0, le=1e5)] | None = None
    mechanism: Literal["gaussian", "tree", "distributed"] = "gaussian"
    separation: Annotated[int, Field(ge=1, le=100_000)] = 1
    participations: Annotated[int, Field(ge=1, le=100_000)] | None = None
    restart: Annotated[int, Field(ge=0, le=100_000)] = 0
    accountant: Literal["rdp", "pld"] = "rdp"

    @model_validator(mode="after")
    def _something_to_keep(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give epsilon or noise_multiplier, or both")
        return self

    def central(self, federation: Federation, clients: int) -> CentralPrivacy:
        """What it promises in a run.

        Args:
            federation: how rounds are run.
            clients: how many there are.

        Raises:
            ValueError: if it contradicts itself, or the run.
        """
        try:
            return CentralPrivacy(
                **self.model_dump(),
                rounds=federation.rounds,
                clients=clients,
                fraction=federation.fraction,
                sampling=federation.sampling,
            )
        except BudgetError as error:
            raise ValueError(str(error).replace("client privacy: ", "client_privacy: ")) from None
