"""The reduce piece against clients that lie: the geometric median of whole updates.

Distances between updates are those of the products ``s_k (B_k A_k - B_k0 A_k0)``, over all modules
and other tensors together. They come from the Gram matrix of inner products, each of which is
``sum((B_l^T B_k) * (A_l A_k^T))``: nothing dense is made, ranks may differ, and no client gains
by turning its factors into another gauge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Piece
from aggregation.reducing import Accumulator, Reduced
from aggregation.spec import AdapterSpec


@dataclass(frozen=True)
class GeometricMedian(Piece):
    """Reduce: the point with the least weighted sum of distances to the updates (RFA, 1912.13445).

    The smoothed Weiszfeld iteration of the paper (algorithm 2): weights
    ``p_k / max(nu, |x_k - v|)``, normalised, give the next v, which is always a weighted mean of
    the updates. It withstands liars as long as they hold less than half of the weight; by how
    much it is drawn aside depends on how far the honest are from each other.

    Updates are kept until the end, so memory grows with the number of clients.

    Attributes:
        nu: smoothing, as a share of the root mean square size of the updates.
        iterations: at most this many.
    """

    nu: float = 1e-6
    iterations: int = 1000
    kind = "geometric-median"
    linear = False
    weighted = False
    delta = True
    mixed_ranks = True
    counts_unchanged = True  # who stays put has a say in where the middle is

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new collection of updates; always measured."""
        return _Collected(spec, self)

    def weights(self, gram: Array, prior: Array) -> Array:
        """Each update's weight in the geometric median.

        Args:
            gram: inner products of the updates, (K, K).
            prior: p_k, (K,), of sum 1.

        Returns:
            Weights of shape (K,) and sum 1.
        """
        sizes = np.diagonal(gram)
        floor = max(self.nu * float(np.sqrt(prior @ sizes)), np.finfo(np.float64).tiny)
        weights = prior
        for _ in range(self.iterations):
            squared = sizes - 2.0 * (gram @ weights) + weights @ gram @ weights
            pulls = prior / np.maximum(floor, np.sqrt(np.maximum(squared, 0.0)))
            following = pulls / pulls.sum()
            done = float(np.abs(following - weights).sum()) < 1e-12
            weights = following
            if done:
                break
        return weights


class _Collected:
    """All updates of a round, as stacked factors."""

    def __init__(self, spec: AdapterSpec, rule: GeometricMedian) -> None:
        self._spec = spec
        self._rule = rule
        self._products: list[dict[str, LowRank]] = []
        self._others: list[dict[str, Array]] = []
        self._weights: list[float] = []

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        names = [module.name for module in self._spec.modules]
        self._products.append({n: LowRank.of(adapter, n) - LowRank.of(start, n) for n in names})
        keys = [tensor.key for tensor in self._spec.others]
        self._others.append(
            {k: np.subtract(adapter.tensors[k], start.tensors[k], dtype=np.float64) for k in keys}
        )
        self._weights.append(weight)

    def finish(self, total: float) -> Reduced:
        weights = self._rule.weights(self._gram(), np.array(self._weights) / total)
        products = {}
        for module in self._spec.modules:
            terms = [
                float(w) * one[module.name] for w, one in zip(weights, self._products, strict=True)
            ]
            left, right = [t.B for t in terms], [t.A for t in terms]
            products[module.name] = LowRank(np.hstack(left), np.vstack(right))
        others = {}
        for tensor in self._spec.others:
            change = np.zeros(tensor.shape)
            for weight, one in zip(weights, self._others, strict=True):
                change += weight * one[tensor.key]
            others[tensor.key] = change
        return Reduced(products, None, others)

    def _gram(self) -> Array:
        count = len(self._weights)
        gram = np.zeros((count, count))
        for k in range(count):
            for other in range(k + 1):
                inner = sum(
                    matrix.inner(self._products[other][name])
                    for name, matrix in self._products[k].items()
                )
                inner += sum(
                    float(np.sum(change * self._others[other][key]))
                    for key, change in self._others[k].items()
                )
                gram[k, other] = gram[other, k] = inner
        return gram
