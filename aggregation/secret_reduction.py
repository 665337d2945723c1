"""An aggregation of which the server sees sums only: what a secure sum tells, and nothing else.

In place of updates that are added one by one comes what they amount to::

    reduction = recipe.begin(state)                  # private=secure-sum
    reduction.add_sum(layout.read(total, clients))   # from aggregation.secret
    basis = reduction.question()                     # of reduce=sketch; else nothing
    reduction.answer_sum(sketches)                   # then the second sum
    state, report = reduction.finish()

The result is that of the clear updates, but for the rounding of the ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.clipped_sum import ClippedSum
from aggregation.combining import Reduction
from aggregation.errors import AggregationError
from aggregation.index_mean import IndexMean
from aggregation.low_rank import Array
from aggregation.reducing import Reduced
from aggregation.secret import Summed
from aggregation.secret_ring import SecretError
from aggregation.shared_noise import SharedSum
from aggregation.sketches import Sketches
from aggregation.sketching import EVERYBODY, SketchSum
from aggregation.update import Update


@dataclass(frozen=True, eq=False)
class SumOfChanges:
    """The mean of factors, or of each rank index, out of a sum; an accumulator that is full.

    Attributes:
        summed: what the server knows.
        by_index: whether each rank index is divided by the weight of those who changed it.
    """

    summed: Summed
    by_index: bool = False

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Refused: nothing would hide a single update beside a sum.

        Raises:
            AggregationError: always.
        """
        raise AggregationError("this round has a secure sum; single updates cannot be added to it")

    def finish(self, total: float) -> Reduced:
        """The mean over the total weight."""
        factors = {}
        for name, (left, right) in (self.summed.change.factors or {}).items():
            share: Array = np.full(right.shape[0], 1.0 / total)
            if self.by_index:
                weights = self.summed.indices[name]
                share = np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)
            factors[name] = left * share, right * share[:, None]
        others = {key: change / total for key, change in self.summed.change.others.items()}
        return Reduced({}, factors, others)


class SecureReduction(Reduction):
    """A :class:`Reduction` of a recipe whose ``private`` is secure."""

    bound = 0.0  # how far each value of the mean can be from the exact one, once the sum is in

    def add(self, update: Update) -> None:
        """Refused: with a secure sum nobody sees an update.

        Raises:
            AggregationError: always.
        """
        raise AggregationError(
            f"{self._recipe.name}: private={self._recipe.private} lets the server see sums only, "
            "and this is one client's update; choose private=none to add updates in the clear"
        )

    def before_unmasking(self, inputs: str) -> None:
        """To be called before anybody can know the sum: where it comes with noise, that is paid.

        Args:
            inputs: hex fingerprint of the masked sum, which no other sum has.
        """
        if isinstance(self._sum, SharedSum):
            self._sum.pay(inputs)

    def add_sum(self, summed: Summed) -> None:
        """Take the sum of all clients of the round.

        Args:
            summed: from :meth:`aggregation.secret.Layout.read`.

        Raises:
            AggregationError: if there is one already, or it lacks what the reduce needs.
            SecretError: if it has values that are NaN or infinite.
        """
        self._open()
        if self._used:
            raise AggregationError("this round has its secure sum already")
        found = [summed.vector, *summed.sketches.values(), *summed.indices.values()]
        _check_finite(found)
        reduce = self._recipe.reduce
        if isinstance(self._sum, ClippedSum):
            self._sum.vectors.add_sum(summed.vector, summed.clients)
        elif isinstance(self._sum, SharedSum):
            self._sum.add_sum(summed.vector, summed.longest)
        elif isinstance(self._sum, SketchSum):
            if not summed.sketches:
                raise SecretError("a sketched mean needs the sum of the sketches: it is missing")
            others = summed.change.others
            self._sum.add_first_sum(self._state.round + 1, summed.sketches, others)
        else:
            by_index = isinstance(reduce, IndexMean)
            if by_index and not summed.indices:
                raise SecretError("a mean by index needs the weights of the indices: none came")
            self._sum = SumOfChanges(summed, by_index)
        self._used, self._weight, self.bound = summed.clients, summed.weight, summed.bound
        self._changed = any(values.any() for values in found[: 1 + len(summed.sketches)])

    def answer_sum(self, sketches: Mapping[str, Array]) -> None:
        """The sum of all clients' answers to :meth:`question`, each times its weight.

        Args:
            sketches: by module, float64 of shape (d_in, width).

        Raises:
            AggregationError: if nothing was asked.
            SecretError: if the sum has other shapes, or values that are NaN or infinite.
        """
        self._open()
        shapes = self.answer_shapes()
        if not shapes or not self.waiting():
            raise AggregationError("nothing was asked that could be answered")
        if {name: matrix.shape for name, matrix in sketches.items()} != shapes:
            raise SecretError("the second sum has other modules or shapes than were asked for")
        _check_finite(list(sketches.values()))
        self._sketch_sum().add_second(EVERYBODY, sketches)

    def answer_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of an answer to :meth:`question` by module; empty if nothing was asked."""
        spec, basis = self._state.adapter.spec, self._basis
        return {m.name: (m.d_in, basis[m.name].shape[1]) for m in spec.modules if basis}

    @property
    def in_any_case(self) -> bool:
        """As in the base class; without clients there is no noise of theirs to release."""
        return super().in_any_case and not isinstance(self._sum, SharedSum)

    @property
    def weight(self) -> float:
        """What the clients of the sum weigh together."""
        return self._weight

    def question(self) -> Sketches:
        """What all clients of the sum have to answer; empty if there is no second sum."""
        return super().question() if self._used else {}

    def lacks(self) -> str:
        """Why what has come so far is too little to finish; empty if it is enough."""
        if self.waiting():
            return "the second secure sum of the round is missing"
        return super().lacks()

    def _leave_out_unanswered(self) -> None:
        """Nobody can be left out of a sum: without the second one there is no result."""


def _check_finite(found: list[Array]) -> None:
    if not all(np.isfinite(values).all() for values in found):
        raise SecretError("the sum has values that are NaN or infinite")
