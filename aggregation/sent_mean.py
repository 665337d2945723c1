"""The reduce piece for updates that bring some coordinates, each client its own ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.reducing import Accumulator, FactorMean, ProductSum, Reduced
from aggregation.spec import AdapterSpec


@dataclass(frozen=True)
class SentMean(FactorMean):
    """Reduce: for each coordinate, the mean change over the clients that sent it.

    With S_j the clients whose update moves coordinate j of the factors (or of a head),

        x[j] += sum_{k in S_j} w_k (x_k - x_k0)[j] / sum_{k in S_j} w_k,

    which is how EcoLoRA (2506.02001, section 3.2) averages each segment of the flat adapter over
    those whose turn it was (codec=segments). A coordinate that nobody sent stays. Who sent one is
    seen from its value: what a client sends and has not moved at all counts as not sent, which for
    a trained coordinate in float32 does not happen.

    The exact mean of the products is not known, since nobody has them: the report measures against
    that of what arrived, in which whatever was not sent is as it was.
    """

    kind = "sent-mean"
    weighted = False

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum; ``measure`` adds the products of what arrived, for the report."""
        return _SentMean(spec, measure)


class _SentMean:
    def __init__(self, spec: AdapterSpec, measure: bool) -> None:
        self._spec = spec
        self._exact = ProductSum().accumulator(spec, measure=True) if measure else None
        self._sum = np.zeros(spec.size)
        self._weight = np.zeros(spec.size)

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        change = np.subtract(adapter.pack(), start.pack(), dtype=np.float64)
        self._weight[change != 0] += weight
        change *= weight
        self._sum += change
        if self._exact is not None:
            self._exact.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        mean = np.divide(self._sum, self._weight, out=self._sum, where=self._weight > 0)
        tensors = {
            key: mean[first:behind].reshape(shape)
            for key, (first, behind, shape) in self._spec.layout.items()
        }
        factors = {m.name: (tensors[m.keys[1]], tensors[m.keys[0]]) for m in self._spec.modules}
        products = self._exact.finish(total).products if self._exact is not None else {}
        return Reduced(products, factors, {t.key: tensors[t.key] for t in self._spec.others})
