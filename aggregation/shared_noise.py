"""A sum of clipped updates that comes with its noise, which the clients have added in shares.

The server's part in the privacy of it is to count it before anybody can know the sum, to divide it
by a number that does not depend on who came, and to add nothing to it in the clear.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from aggregation.adapter import Adapter
from aggregation.clipped_sum import ClipError, Noise, spread
from aggregation.errors import AggregationError, RecipeError
from aggregation.low_rank import Array
from aggregation.reducing import Reduced
from aggregation.spec import AdapterSpec


@dataclass
class SharedSum:
    """One round's sum: an accumulator, see :mod:`aggregation.reducing`.

    Attributes:
        spec: of the global adapter.
        keys: the tensors that clients send in this round.
        cohort: number of clients by which the sum is divided, whoever came.
        number: of the round, from 1.
        noise: where what it costs is counted.
        vector: the sum, with its noise; None before it is there.
        paid: whether what it costs is counted.
    """

    spec: AdapterSpec
    keys: tuple[str, ...]
    cohort: float
    number: int
    noise: Noise
    vector: Array | None = field(init=False, default=None)
    paid: bool = field(init=False, default=False)

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Refused: one client's share of noise is too little to hide its update.

        Raises:
            AggregationError: always.
        """
        raise AggregationError(
            "a client's own share of the noise does not hide its update; only the sum can be added"
        )

    def pay(self, inputs: str) -> None:
        """Count what this sum costs, durably, before it can be known.

        Args:
            inputs: hex fingerprint of the masked sum, which no other sum has. So each unmasking
                is counted: the noise of no two is the same.
        """
        self.noise.pay(self.number, inputs)
        self.paid = True

    def add_sum(self, vector: Array, longest: float) -> None:
        """Take the sum of all clients.

        Args:
            vector: with their noise.
            longest: the norm that it can have.

        Raises:
            AggregationError: if it was not paid before.
            ClipError: if it is longer: somebody did not clip, and nothing can be said of what one
                client is in it.
        """
        if not self.paid:
            raise AggregationError("this sum has to be counted before it is known: call pay first")
        norm = float(np.linalg.norm(vector))
        if not norm <= longest * (1 + 1e-9):
            raise ClipError(
                f"the sum has norm {norm:.4g}, and clipped vectors with their noise reach "
                f"{longest:.4g} at most: somebody did not clip"
            )
        self.vector = vector

    def finish(self, total: float) -> Reduced:
        """The noisy mean over the number of clients that were asked, however many came.

        Args:
            total: the weight of those who came; not used.

        Raises:
            RecipeError: if there is no sum.
        """
        if self.vector is None:
            raise RecipeError("there is no sum, and without the clients no noise to release")
        return spread(self.spec, self.keys, self.vector / self.cohort)
