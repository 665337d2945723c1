"""The reduce piece: many updates into one mean change, as a running sum.

Each update is folded in as it comes and then forgotten (:mod:`aggregation.summing`), so memory
does not grow with the number of clients, except in :mod:`aggregation.robust`. Sums carry
unnormalised weights and are divided once, at the end.

With p_k the normalised weights, s_k the scale of client k and (B_k0, A_k0) its own start:

* :class:`ProductSum`: per module, the exact mean change ``sum p_k s_k (B_k A_k - B_k0 A_k0)``;
* :class:`FactorMean`: the mean change of B and of A separately, which is what FedIT hands out;
* :class:`RankMean`: per rank index, the mean over the clients that have it.

Tensors outside the modules (heads) get the weighted mean of their changes in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Reduce
from aggregation.running_sum import IndexSums
from aggregation.spec import AdapterSpec
from aggregation.summing import Lazy, ProductSums, TensorSum

Factors = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Reduced:
    """A mean change.

    Attributes:
        products: by module, the exact mean change in product space; empty if not measured.
        factors: by module, the mean change of (B, A); None if the reduce is in product space.
        others: by tensor name, the mean change.
        shares: of the updates in it, in the order in which they were added; empty if they are
            those of the weights.
        lost: by module, the norm of what the reduce itself could not keep of the exact mean;
            empty if nothing.
        buffers: what the state is to remember of it, by name; see ``GlobalState.buffers``.
    """

    products: Mapping[str, LowRank]
    factors: Mapping[str, Factors] | None
    others: Mapping[str, Array]
    shares: tuple[float, ...] = ()
    lost: Mapping[str, float] = field(default_factory=dict)
    buffers: Mapping[str, Array] = field(default_factory=dict)


class Accumulator(Protocol):
    """A reduce in progress."""

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Fold one trained adapter in, relative to where its training started."""

    def finish(self, total: float) -> Reduced:
        """The mean over the total weight."""


class _ProductSum:
    def __init__(self, spec: AdapterSpec) -> None:
        self._products = ProductSums(spec)
        self._others = TensorSum(spec, _others(spec))

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._products.add(adapter, start, weight)
        self._others.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        return Reduced(self._products.result(1.0 / total), None, self._others.finish(1.0 / total))


class _FactorMean:
    def __init__(self, spec: AdapterSpec, measure: bool) -> None:
        self._spec = spec
        self._tensors = TensorSum(spec, spec.layout)
        self._products = ProductSums(spec) if measure else None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._tensors.add(adapter, start, weight)
        if self._products is not None:
            self._products.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        means = self._tensors.finish(1.0 / total)
        factors = {m.name: (means[m.keys[1]], means[m.keys[0]]) for m in self._spec.modules}
        others = {key: means[key] for key in _others(self._spec)}
        products = self._products.result(1.0 / total) if self._products is not None else {}
        return Reduced(products, factors, others)


class _RankMean:
    """Every rank index on its own: the sum over the clients that have it, over their weight."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._sums = {m.name: IndexSums(m.d_out, m.d_in) for m in spec.modules}
        self._weights = {m.name: np.zeros(min(m.d_out, m.d_in)) for m in spec.modules}
        self._starts: dict[str, tuple[Adapter, float]] = {}
        self._others = TensorSum(spec, _others(spec))

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._fold(adapter, weight)
        for name, weights in self._weights.items():
            weights[: adapter.spec.module(name).rank] += weight
        _, so_far = self._starts.get(start.digest, (start, 0.0))
        self._starts[start.digest] = (start, so_far + weight)
        self._others.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        for start, weight in self._starts.values():
            self._fold(start, -weight)
        products = Lazy(self._sums, self._mean)
        return Reduced(products, None, self._others.finish(1.0 / total))

    def _mean(self, name: str) -> LowRank:
        sums = self._sums[name]
        weights = self._weights[name][: len(sums)]
        shares = np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)
        return sums.result(shares.tolist())

    def _fold(self, adapter: Adapter, weight: float) -> None:
        for name, sums in self._sums.items():
            left, right = adapter.factors(name)
            sums.add(left, right, weight * adapter.spec.scale(name))


@dataclass(frozen=True)
class ProductSum(Reduce):
    """Reduce: the exact mean of the products.

    Relative to each client's own start (``delta``), a client that changed nothing contributes
    nothing, whatever happened to the global factors in the meantime; ranks, alphas and gauges may
    differ between clients. Without ``delta`` the mean is that of the products themselves, as
    FlexLoRA and FLoRIST publish it: what a truncated client never held then counts as zero.

    Attributes:
        delta: whether changes are added up, or the products.
    """

    delta: bool = True
    kind = "product-sum"
    linear = False
    weighted = True
    mixed_ranks = True
    counts_unchanged = False

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum for adapters with this specification's modules; always measured."""
        return _ProductSum(spec)


@dataclass(frozen=True)
class RankMean(Reduce):
    """Reduce: each rank index averaged over the clients that have it (raFLoRA, 2602.13486).

    With h over the rank levels and N_h the weight of the clients of rank h or more,
    ``sum_h sum_{k: r_k >= h} (n_k / N_h) s_k B_k[:, l:h] A_k[l:h, :]``, l the level below h:
    clients of low rank do not dilute the directions that they cannot train. Which levels came this
    round plays no part, only who has which index; an index that nobody brought keeps its value.
    Here relative to each client's start, which is the same in a synchronous round and right for
    late updates.

    N_h is known only at the end, so each rank index has a sum of its own: memory is bounded by so
    many matrices a module as the highest rank, and mostly far below.
    """

    kind = "rank-mean"
    reference = "the mean by rank index"
    linear = False
    weighted = False
    delta = True
    mixed_ranks = True
    counts_unchanged = True  # they are part of N_h

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum for adapters with this specification's modules; always measured."""
        return _RankMean(spec)


@dataclass(frozen=True)
class FactorMean(Reduce):
    """Reduce: the mean of B and the mean of A, each on its own (FedIT, Zhang et al. 2023).

    Its product differs from the mean of the products by the covariance
    ``sum p_k (B_k - mean B)(A_k - mean A)``; the report says by how much.
    """

    kind = "factor-mean"
    factors = True
    linear = True
    weighted = True
    delta = True
    mixed_ranks = False
    counts_unchanged = False

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum; ``measure`` adds the exact products, for the report."""
        return _FactorMean(spec, measure)


def _others(spec: AdapterSpec) -> list[str]:
    return [tensor.key for tensor in spec.others]
