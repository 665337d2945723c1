"""The reduce piece for clients that train some of the rank indices, each its own ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import Array
from aggregation.padded_mean import padded
from aggregation.piece import Reduce
from aggregation.reducing import Accumulator, Factors, ProductSum, Reduced
from aggregation.spec import AdapterSpec


@dataclass(frozen=True)
class IndexMean(Reduce):
    """Reduce: for each rank index, the mean change over the clients that changed it.

    With S_j the clients that changed column j of B or row j of A,

        B[:, j] += sum_{k in S_j} w_k (B_k - B_k0)[:, j] / sum_{k in S_j} w_k,

    and the same for A[j, :]. This is how Fed-PLoRA (2602.16936, section 4) averages its rank-one
    modules over those who trained them, and LoRA-A2 (2410.22815, section 4.2) its uploaded indices;
    over all clients instead (reduce=factor-mean) an index that few choose hardly moves. It is the
    exact mean of the products only where all changed the same indices and one factor, since the
    weights differ from index to index; the report gives the distance.

    Who changed an index is seen from its values, bit for bit, so no mask has to travel. Under a
    secure sum masks have to be public (random ranks are), and the weight of every index is summed
    along: two linear sums. Clients of a lower rank hold the first indices (distribute=cut) and have
    no say in the others, which is the mean of RBLA (2408.08699).
    """

    kind = "index-mean"
    factors = True
    linear = True
    delta = True
    mixed_ranks = True

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum; ``measure`` adds the exact products, for the report."""
        return _IndexSum(spec, measure)


class _IndexSum:
    def __init__(self, spec: AdapterSpec, measure: bool) -> None:
        self._spec = spec
        self._sums = {key: np.zeros(shape) for key, shape in spec.shapes().items()}
        self._weights = {m.name: np.zeros(m.rank) for m in spec.modules}
        self._exact = ProductSum().accumulator(spec, measure=True) if measure else None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        for module in self._spec.modules:
            key_a, key_b = module.keys
            left, right = padded(adapter, self._spec, module.name)
            left0, right0 = padded(start, self._spec, module.name)
            step_left, step_right = left - left0, right - right0
            rank = right.shape[0]
            changed = np.any(step_left, axis=0) | np.any(step_right, axis=1)
            self._sums[key_b][:, :rank] += weight * step_left
            self._sums[key_a][:rank] += weight * step_right
            self._weights[module.name][:rank] += weight * changed
        for tensor in self._spec.others:
            change = np.subtract(
                adapter.tensors[tensor.key], start.tensors[tensor.key], dtype=np.float64
            )
            self._sums[tensor.key] += weight * change
        if self._exact is not None:
            self._exact.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        factors: dict[str, Factors] = {}
        for module in self._spec.modules:
            key_a, key_b = module.keys
            share = _inverse(self._weights[module.name])
            factors[module.name] = self._sums[key_b] * share, self._sums[key_a] * share[:, None]
        others = {t.key: self._sums[t.key] / total for t in self._spec.others}
        products = self._exact.finish(total).products if self._exact is not None else {}
        return Reduced(products, factors, others)


def _inverse(weights: Array) -> Array:
    """One over each weight; 0 for an index that nobody changed, whose sum is 0 too."""
    return np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)
