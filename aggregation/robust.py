"""The reduce piece against clients that lie: rules that weigh whole updates.

What a rule looks at are norms, inner products and distances of the products
``s_k (B_k A_k - B_k0 A_k0)``, over all modules and other tensors together, see
:mod:`aggregation.robust_gram`. So ranks may differ, and no client gains by turning its factors into
another gauge. The result is ``sum c_k change_k`` with coefficients that the rule finds.

* :class:`GeometricMedian`, :class:`FLTrust`, :class:`NormClip` weigh all updates, here;
* Krum and Multi-Krum choose some, in :mod:`aggregation.robust_rules`;
* median, trimmed mean and Bulyan decide per coordinate, in :mod:`aggregation.coordinate_rules`.

A client's claimed weight is the easiest thing to lie about. Which rules use it is said with each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.low_rank import Array
from aggregation.piece import Reduce
from aggregation.reducing import Accumulator, ProductSum, Reduced
from aggregation.robust_gram import Change, Changes
from aggregation.spec import AdapterSpec

_STILL = 1e-12  # share of the reach below which a step of the iteration is none


class Trusting(Accumulator, Protocol):
    """A reduce in progress that measures updates against one that the server trusts."""

    def trust(self, adapter: Adapter, start: Adapter) -> None:
        """The trusted update; it gives a direction and is not averaged itself."""


@dataclass(frozen=True)
class Weighed:
    """What a rule in product space says.

    Attributes:
        coefficients: the result is the sum of these times the changes; shape (K,).
        shares: how much of a say each client has, for the report; shape (K,).
    """

    coefficients: Array
    shares: Array


@dataclass(frozen=True)
class ProductRule(Reduce, ABC):
    """Base of the rules that look at whole updates in product space.

    Updates are kept until the end, so memory grows with the number of clients.
    """

    delta = True
    robust = True
    reference = "the updates as the rule weighs them"
    counts_unchanged = True  # who stays put has a say in where the others are

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new collection of updates; always measured."""
        return _Collected(spec, self)

    @abstractmethod
    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """What each change counts.

        Args:
            changes: of all K clients.
            prior: p_k, the clients' weights, (K,), of sum 1.
            root: the change that the server trusts, for a rule that ``trusts``.
        """


@dataclass(frozen=True)
class GeometricMedian(ProductRule):
    """Reduce: the point with the least weighted sum of distances to the updates (RFA, 1912.13445).

    The smoothed Weiszfeld iteration of the paper (algorithm 2): weights
    ``p_k / max(nu, |x_k - v|)``, normalised, give the next v, which is always a weighted mean of
    the updates. It withstands liars as long as they hold less than half of the weight; by how
    much it is drawn aside depends on how far the honest are from each other.

    It uses the clients' weights, as the paper does. Where those are mere claims, choose
    ``weigh=uniform``. Our nu is relative, so that it means the same for small and large updates: to
    the reach of the most central update, within which more than half of the weight is. Liars below
    half cannot move that beyond the honest ones, as they could a mean of distances; if it is 0,
    more than half is at one point, and that point is the median.

    Attributes:
        nu: smoothing, as a share of that reach.
        iterations: at most this many.

    Raises:
        RecipeError: if either is not above 0.
    """

    nu: float = 1e-6
    iterations: int = 1000
    kind = "geometric-median"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nu) and self.nu > 0):
            raise RecipeError(f"nu={self.nu} must be above 0 and finite; usual is 1e-6")
        if self.iterations < 1:
            raise RecipeError(f"iterations={self.iterations} must be 1 or more; usual is 1000")

    def weights(self, inner: Array, prior: Array, reach: float) -> Array:
        """Each update's weight in the geometric median.

        Distances to a weighted mean v follow from inner products G relative to the most central
        update, ``|x_k - v|^2 = G_kk - 2 (G w)_k + w^T G w``: what all have in common plays no part,
        and a liar as far away as values can be has next to no weight in all three terms, so that it
        hides nothing of the others. For the same reason the iteration ends when v stands still, and
        not the weights.

        Args:
            inner: G, (K, K), from :meth:`aggregation.robust_gram.Changes.around`.
            prior: p_k, (K,), of sum 1.
            reach: of the most central update; above 0.

        Returns:
            Weights of shape (K,) and sum 1.
        """
        weights = prior
        for _ in range(self.iterations):
            pulled = inner @ weights
            squared = np.diagonal(inner) - 2.0 * pulled + float(weights @ pulled)
            pulls = prior / np.maximum(self.nu * reach, np.sqrt(np.maximum(squared, 0.0)))
            following = pulls / pulls.sum()
            step = following - weights
            weights = following
            if float(step @ inner @ step) < (_STILL * reach) ** 2:
                break
        return weights

    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """The weights of the geometric median."""
        middle, reach = most_central(changes.squared, prior)
        if reach:
            weights = self.weights(changes.around(middle), prior, reach)
        else:
            weights = np.where(changes.squared[middle] == 0, prior, 0.0)
            weights /= weights.sum()
        return Weighed(weights, weights)


def most_central(squared: Array, prior: Array) -> tuple[int, float]:
    """The update in whose neighbourhood more than half of the weight is, and how far that reaches.

    Args:
        squared: squared distances between the updates, (K, K).
        prior: p_k, (K,), of sum 1.

    Returns:
        The index of the one with the least reach, and the reach: 0 if more than half is where it
        is.
    """
    order = np.argsort(squared, axis=1, kind="stable")
    inside = np.cumsum(prior[order], axis=1) > 0.5 + 1e-9  # half of it is not more than half
    first = np.argmax(inside, axis=1)
    reaches = np.take_along_axis(squared, order, axis=1)[np.arange(len(prior)), first]
    middle = int(np.argmin(reaches))
    return middle, math.sqrt(float(reaches[middle]))


@dataclass(frozen=True)
class FLTrust(ProductRule):
    """Reduce: by agreement with an update that the server trusts (FLTrust, 2012.13995, section 4).

    With g_0 the change of the trusted client, whose data the server knows to be clean,
    ``TS_k = max(0, cos(g_k, g_0))`` and ``sum_k TS_k (|g_0| / |g_k|) g_k / sum_k TS_k``: whoever
    points the other way counts nothing, and nobody counts by being loud. Any number of liars is
    withstood as long as g_0 points the right way. If nobody agrees with it, the change is zero.

    The trusted update is not averaged itself, as in the paper; nor are the clients' weights used,
    as in the paper: trust takes their place.
    """

    kind = "fltrust"
    trusts = True
    silence = (
        "no update points the way of the trusted client's, so none counts: look at its data, "
        "at whether it really trains, and at the learning rate"
    )

    def needs(self, expected: int) -> str:
        """The trusted update and one to measure against it."""
        if expected < 2:
            return (
                f"reduce=fltrust needs the trusted update and at least one other, got {expected}; "
                "ask more clients"
            )
        return ""

    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """Trust scores, and each update at the length of the trusted one.

        Raises:
            RecipeError: if there is no trusted change.
        """
        if root is None:
            raise RecipeError("reduce=fltrust has no trusted update to measure the others against")
        gram = Changes(changes.spec, [*changes.each, root]).gram
        sizes = np.sqrt(np.diagonal(gram))
        lengths = sizes[:-1] * sizes[-1]
        cosines = np.divide(gram[-1, :-1], lengths, out=np.zeros_like(lengths), where=lengths > 0)
        trust = np.maximum(cosines, 0.0)
        shares = trust / trust.sum() if trust.any() else trust
        ratios = np.divide(sizes[-1], sizes[:-1], out=np.zeros_like(lengths), where=lengths > 0)
        return Weighed(shares * ratios, shares)


@dataclass(frozen=True)
class NormClip(ProductRule):
    """Reduce: the weighted mean of updates clipped to a norm (Sun et al. 2019, 1911.07963, 4).

    ``sum_k p_k min(1, C / |x_k|) x_k``: no update moves the result by more than p_k C. The norm is
    that of the products, over all modules and other tensors together: clipping factors bounds
    nothing, as the same product comes in factors of any size.

    It uses the clients' weights, as the paper does; where those are mere claims, choose
    ``weigh=uniform``. Clipping lessens what one liar can do, and does not remove a coalition.

    With ``norm=0``, C is the median of this round's norms, which liars below half cannot move
    beyond the honest ones; updates are then kept until the end. With a fixed norm they are added up
    as they come.

    Attributes:
        norm: C; 0 for the median of the round.

    Raises:
        RecipeError: if it is negative or not finite.
    """

    norm: float = 0.0
    kind = "norm-clip"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.norm) and self.norm >= 0):
            raise RecipeError(
                f"norm-clip: norm={self.norm} must be finite and 0 or more; 0 takes the median of "
                "the round's norms"
            )

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A running sum where the norm is fixed, else a collection; always measured."""
        return _Clipped(spec, self.norm) if self.norm else _Collected(spec, self)

    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """The clients' weights, less what is clipped."""
        norms = np.array([one.norm() for one in changes.each])
        kept = prior * clipping(norms, self.norm or float(np.median(norms)))
        return Weighed(kept, kept)


def clipping(norms: Array, limit: float) -> Array:
    """``min(1, limit / norm)`` of each; 1 for a norm of 0."""
    return np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)


class _Clipped:
    """A sum of clipped updates, which keeps none of them."""

    def __init__(self, spec: AdapterSpec, norm: float) -> None:
        self._sum = ProductSum().accumulator(spec, measure=True)
        self._norm = norm
        self._kept: list[float] = []

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        norms = np.array([Change(adapter, start).norm()])
        self._kept.append(weight * float(clipping(norms, self._norm)[0]))
        self._sum.add(adapter, start, self._kept[-1])

    def finish(self, total: float) -> Reduced:
        shares = tuple(kept / total for kept in self._kept)
        return replace(self._sum.finish(total), shares=shares)


class _Collected:
    """All updates of a round, until a rule weighs them."""

    def __init__(self, spec: AdapterSpec, rule: ProductRule) -> None:
        self._spec = spec
        self._rule = rule
        self._changes: list[Change] = []
        self._weights: list[float] = []
        self._root: Change | None = None

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._changes.append(Change(adapter, start))
        self._weights.append(weight)

    def trust(self, adapter: Adapter, start: Adapter) -> None:
        self._root = Change(adapter, start)

    def finish(self, total: float) -> Reduced:
        reason = self._rule.needs(len(self._changes) + (self._root is not None))
        if reason:
            raise RecipeError(reason)
        weights = np.array(self._weights)
        changes = Changes(self._spec, self._changes)
        said = self._rule.weigh(changes, weights / weights.sum(), self._root)
        result = ProductSum().accumulator(self._spec, measure=True)
        for change, coefficient in zip(self._changes, said.coefficients, strict=True):
            if coefficient:
                result.add(change.adapter, change.start, float(coefficient))
        return replace(result.finish(1.0), shares=tuple(float(s) for s in said.shares))
