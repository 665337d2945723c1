"""The reduce piece: many updates into one mean change, as a running sum.

Each update is folded in as it comes and then forgotten, so memory does not grow with the number
of clients (except in :class:`RankMean`, and in :mod:`aggregation.robust`). Sums carry unnormalised
weights and are divided once, at the end.

With p_k the normalised weights, s_k the scale of client k and (B_k0, A_k0) its own start:

* :class:`ProductSum`: per module, the exact mean change ``sum p_k s_k (B_k A_k - B_k0 A_k0)``;
* :class:`FactorMean`: the mean change of B and of A separately, which is what FedIT hands out;
* :class:`RankMean`: per rank index, the mean over the clients that have it.

Tensors outside the modules (heads) get the weighted mean of their changes in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aggregation.adapter import Adapter
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Piece
from aggregation.spec import AdapterSpec, ModuleSpec

Factors = tuple[Array, Array]
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Reduced:
    """A mean change.

    Attributes:
        products: by module, the exact mean change in product space; empty if not measured.
        factors: by module, the mean change of (B, A); None if the reduce is in product space.
        others: by tensor name, the mean change.
    """

    products: Mapping[str, LowRank]
    factors: Mapping[str, Factors] | None
    others: Mapping[str, Array]


class Accumulator(Protocol):
    """A reduce in progress."""

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Fold one trained adapter in, relative to where its training started."""

    def finish(self, total: float) -> Reduced:
        """The mean over the total weight."""


class RunningSum:
    """A sum of ``weight * B A`` terms of one module, in float64, in bounded memory.

    Thin factors are stacked while that is the smaller form. From R > d_out d_in / (d_out + d_in)
    on, the sum of the terms has no smaller form than d_out x d_in numbers, and it becomes that.
    """

    def __init__(self, d_out: int, d_in: int) -> None:
        self._shape = (d_out, d_in)
        self._limit = max(1, d_out * d_in // (d_out + d_in))
        self._left: list[Array] = []
        self._right: list[Array] = []
        self._pending = 0
        self._matrix: Array | None = None

    def add(self, left: np.ndarray, right: np.ndarray, weight: float) -> None:
        """Add ``weight * left @ right``."""
        self._left.append(np.multiply(left, weight, dtype=np.float64))
        self._right.append(right.astype(np.float64))
        self._pending += left.shape[1]
        if self._pending > (self._limit if self._matrix is None else min(_BATCH, self._limit)):
            self._flush()

    def result(self) -> LowRank:
        """The sum so far."""
        if self._matrix is None:
            if not self._left:
                return LowRank.zero(*self._shape)
            return LowRank(np.hstack(self._left), np.vstack(self._right))
        self._flush()
        d_out, d_in = self._shape
        if d_in <= d_out:
            return LowRank(self._matrix, np.eye(d_in))
        return LowRank(np.eye(d_out), self._matrix)

    def _flush(self) -> None:
        if self._matrix is None:
            self._matrix = np.zeros(self._shape)
        if self._left:
            self._matrix += np.hstack(self._left) @ np.vstack(self._right)
        self._left, self._right, self._pending = [], [], 0


class _Products:
    """Exact mean change of every module: the sum over clients, minus the sum over their starts."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self._sums = {m.name: RunningSum(m.d_out, m.d_in) for m in spec.modules}
        # Starts are few and shared: their weights are summed and they are subtracted once.
        self._starts: dict[str, tuple[Adapter, float]] = {}

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._fold(adapter, weight)
        _, so_far = self._starts.get(start.digest, (start, 0.0))
        self._starts[start.digest] = (start, so_far + weight)

    def finish(self, total: float) -> dict[str, LowRank]:
        for start, weight in self._starts.values():
            self._fold(start, -weight)
        self._starts = {}
        return {name: running.result() * (1.0 / total) for name, running in self._sums.items()}

    def _fold(self, adapter: Adapter, weight: float) -> None:
        for name, running in self._sums.items():
            left, right = adapter.factors(name)
            running.add(left, right, weight * adapter.spec.scale(name))


class _Tensors:
    """Mean change of named tensors."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {key: np.zeros(shape) for key, shape in shapes.items()}

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        for key, running in self._sums.items():
            change = np.subtract(adapter.tensors[key], start.tensors[key], dtype=np.float64)
            change *= weight
            running += change

    def finish(self, total: float) -> dict[str, Array]:
        return {key: running / total for key, running in self._sums.items()}


class _ProductSum:
    def __init__(self, spec: AdapterSpec) -> None:
        self._products = _Products(spec)
        self._others = _Tensors(_other_shapes(spec))

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._products.add(adapter, start, weight)
        self._others.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        return Reduced(self._products.finish(total), None, self._others.finish(total))


class _FactorMean:
    def __init__(self, spec: AdapterSpec, measure: bool) -> None:
        self._spec = spec
        self._tensors = _Tensors(spec.shapes())
        self._products = _Products(spec) if measure else None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._tensors.add(adapter, start, weight)
        if self._products is not None:
            self._products.add(adapter, start, weight)

    def finish(self, total: float) -> Reduced:
        means = self._tensors.finish(total)
        factors = {m.name: _pair(means, m) for m in self._spec.modules}
        others = {key: means[key] for key in _other_shapes(self._spec)}
        products = self._products.finish(total) if self._products is not None else {}
        return Reduced(products, factors, others)


class _RankMean:
    """Every rank index on its own: the sum over the clients that have it, over their weight."""

    def __init__(self, spec: AdapterSpec) -> None:
        self._terms: dict[str, list[tuple[Array, Array]]] = {m.name: [] for m in spec.modules}
        widest = {m.name: min(m.d_out, m.d_in) for m in spec.modules}
        self._weights = {name: np.zeros(width) for name, width in widest.items()}
        self._starts: dict[str, tuple[Adapter, float]] = {}
        self._others = _Tensors(_other_shapes(spec))

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
        products = {}
        for name, terms in self._terms.items():
            lefts = [left / self._weights[name][: left.shape[1]] for left, _ in terms]
            products[name] = LowRank(np.hstack(lefts), np.vstack([right for _, right in terms]))
        return Reduced(products, None, self._others.finish(total))

    def _fold(self, adapter: Adapter, weight: float) -> None:
        for name, terms in self._terms.items():
            left, right = adapter.factors(name)
            scaled = np.multiply(left, weight * adapter.spec.scale(name), dtype=np.float64)
            terms.append((scaled, right.astype(np.float64)))


@dataclass(frozen=True)
class ProductSum(Piece):
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
class RankMean(Piece):
    """Reduce: each rank index averaged over the clients that have it (raFLoRA, 2602.13486).

    With h over the rank levels and N_h the weight of the clients of rank h or more,
    ``sum_h sum_{k: r_k >= h} (n_k / N_h) s_k B_k[:, l:h] A_k[l:h, :]``, l the level below h:
    clients of low rank do not dilute the directions that they cannot train. Which levels came this
    round plays no part, only who has which index; an index that nobody brought keeps its value.
    Here relative to each client's start, which is the same in a synchronous round and right for
    late updates.

    Terms are kept until the end, so memory grows with the sum of the clients' ranks.
    """

    kind = "rank-mean"
    linear = False
    weighted = False
    delta = True
    mixed_ranks = True
    counts_unchanged = True  # they are part of N_h

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum for adapters with this specification's modules; always measured."""
        return _RankMean(spec)


@dataclass(frozen=True)
class FactorMean(Piece):
    """Reduce: the mean of B and the mean of A, each on its own (FedIT, Zhang et al. 2023).

    Its product differs from the mean of the products by the covariance
    ``sum p_k (B_k - mean B)(A_k - mean A)``; the report says by how much.
    """

    kind = "factor-mean"
    linear = True
    weighted = True
    delta = True
    mixed_ranks = False
    counts_unchanged = False

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new sum; ``measure`` adds the exact products, for the report."""
        return _FactorMean(spec, measure)


def _pair(tensors: Mapping[str, Array], module: ModuleSpec) -> Factors:
    key_a, key_b = module.keys
    return tensors[key_b], tensors[key_a]


def _other_shapes(spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    return {tensor.key: tensor.shape for tensor in spec.others}
