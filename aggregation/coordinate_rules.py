"""The reduce piece against clients that lie: rules that decide each coordinate by itself.

A coordinate of a factor means something only as long as all clients keep the same gauge, so these
rules need a part of every module frozen (``train=only-b``, or ``alternate``), equal ranks, and
``refactor=keep``; :mod:`aggregation.soundness` says so. Tensors outside the modules, and adapters
that have no others, need nothing of the kind.

Each sorts the clients' changes of a coordinate and averages a window of the sorted values: the
middle one or two (median), all but the outer ones (trimmed mean), or the narrowest around the
median (Bulyan's second stage). The clients' weights are not used, as in the papers: a client could
claim any, and the theory counts heads. Updates are kept until the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Reduce
from aggregation.reducing import Accumulator, Factors, Reduced
from aggregation.robust_gram import Change, Changes
from aggregation.robust_rules import bulyan_choice, check_liars, too_few
from aggregation.spec import AdapterSpec

_NUMBERS = 1 << 21


@dataclass(frozen=True)
class CoordinateRule(Reduce, ABC):
    """Base of the rules that decide each coordinate by itself."""

    delta = True
    robust = True
    reference = "what the rule decides"
    factors = True
    coordinate_wise = True
    mixed_ranks = False
    counts_unchanged = True  # who stays put has a say in where the middle is

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> Accumulator:
        """A new collection of updates; ``measure`` adds the products, for the report."""
        return _Coordinates(spec, self, measure)

    def choose(self, changes: Changes) -> Sequence[int]:
        """The updates whose coordinates count; all, unless a rule says otherwise."""
        return range(len(changes.each))

    @abstractmethod
    def window(self, values: Array) -> tuple[npt.NDArray[np.intp], int]:
        """Which of the sorted values of each coordinate are averaged.

        Args:
            values: of n clients, ascending, of shape (coordinates, n).

        Returns:
            Index of the first one, of shape (coordinates,), and how many.
        """


@dataclass(frozen=True)
class Median(CoordinateRule):
    """Reduce: the median of each coordinate (Yin et al. 2018, 1803.01498, definition 1).

    Of an even number of clients, the mean of the two in the middle. It withstands liars below half;
    where the honest differ in skewed ways, it is not their mean.
    """

    kind = "median"

    def needs(self, expected: int) -> str:
        """3 updates: of two, the median is their mean."""
        if expected < 3:
            return (
                f"reduce=median needs at least 3 updates, and there are {expected}; of two it is "
                "their mean, which either can move anywhere; ask more clients"
            )
        return ""

    def window(self, values: Array) -> tuple[npt.NDArray[np.intp], int]:
        """The middle one or two."""
        count = values.shape[1]
        return np.full(len(values), (count - 1) // 2), 2 - count % 2


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    """Reduce: per coordinate, the mean without the outer values (Yin et al. 2018, definition 2).

    A share beta of the values is left out at either end, floor(beta n) of them, so it withstands as
    many liars. A share that would leave out nobody is refused.

    Attributes:
        share: beta, above 0 and below 1/2.

    Raises:
        RecipeError: if it is out of bounds.
    """

    share: float = 0.2
    kind = "trimmed-mean"

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise RecipeError(
                f"trimmed-mean: share={self.share} must be above 0 and below 0.5: it is left out "
                "at either end; usual is 0.2"
            )

    def trimmed(self, count: int) -> int:
        """How many values are left out at either end."""
        return math.floor(self.share * count + 1e-9)  # 0.29 * 100 is 28.999...

    def needs(self, expected: int) -> str:
        """So many that one at least is left out at either end."""
        if not self.trimmed(expected):
            least = math.ceil(1 / self.share - 1e-9)
            share = f"share={math.ceil(100 / expected) / 100:g}" if expected > 2 else ""
            return (
                f"reduce=trimmed-mean with share={self.share:g} would trim none of {expected} "
                f"updates and be the plain mean; ask at least {least} clients, or choose "
                f"{share or 'reduce=factor-mean'}"
            )
        return ""

    def window(self, values: Array) -> tuple[npt.NDArray[np.intp], int]:
        """All but the outer ones."""
        first = self.trimmed(values.shape[1])
        return np.full(len(values), first), values.shape[1] - 2 * first


@dataclass(frozen=True)
class Bulyan(CoordinateRule):
    """Reduce: Krum's choice, then the middle of it per coordinate (1802.07927, section 4).

    Krum by product distances, repeated, selects theta = n - 2 f updates
    (:func:`aggregation.robust_rules.bulyan_choice`). Of each coordinate, the beta = theta - 2 f
    values nearest to the median of the selected are averaged. For f liars it needs n >= 4 f + 3. It
    closes what Krum leaves open: a liar that is near in norm but far in one coordinate.

    Attributes:
        liars: f, how many clients may lie.

    Raises:
        RecipeError: if it is below 1.
    """

    liars: int = 1
    kind = "bulyan"

    def __post_init__(self) -> None:
        check_liars(self.kind, self.liars)

    def needs(self, expected: int) -> str:
        """4 f + 3 updates."""
        return too_few(self.kind, self.liars, expected, 4)

    def choose(self, changes: Changes) -> Sequence[int]:
        """Krum's repeated choice, in the order of the clients."""
        return sorted(bulyan_choice(changes.squared, self.liars))

    def window(self, values: Array) -> tuple[npt.NDArray[np.intp], int]:
        """The values nearest to the median, which lie side by side; of two such windows the lower.

        A choice among values at the same distance is left open in the paper; ours does not depend
        on the order of the clients.
        """
        count = values.shape[1]
        width = count - 2 * self.liars
        middle = 0.5 * (values[:, (count - 1) // 2] + values[:, count // 2])[:, None]
        low, high = values[:, : count - width + 1], values[:, width - 1 :]
        reach = np.maximum(middle - low, high - middle)
        return np.argmin(reach, axis=1), width


class _Coordinates:
    """All updates of a round, until a rule decides each coordinate."""

    def __init__(self, spec: AdapterSpec, rule: CoordinateRule, measure: bool) -> None:
        self._spec = spec
        self._rule = rule
        self._measure = measure
        self._changes: list[Change] = []

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        self._changes.append(Change(adapter, start))

    def finish(self, total: float) -> Reduced:
        reason = self._rule.needs(len(self._changes))
        if reason:
            raise RecipeError(reason)
        chosen = self._rule.choose(Changes(self._spec, self._changes))
        members = [self._changes[index] for index in chosen]
        moved, counted, deciding = {}, np.zeros(len(members)), 0
        for key, shape in self._spec.shapes().items():
            change, counts, number = _decide(self._rule, members, key)
            moved[key] = change.reshape(shape)
            counted += counts
            deciding += number
        shares = np.zeros(len(self._changes))
        shares[chosen] = counted / deciding if deciding else 1.0 / len(members)
        factors = {}
        for module in self._spec.modules:
            key_a, key_b = module.keys
            factors[module.name] = moved[key_b], moved[key_a]
        others = {tensor.key: moved[tensor.key] for tensor in self._spec.others}
        return Reduced(self._products(factors), factors, others, tuple(shares.tolist()))

    def _products(self, factors: dict[str, Factors]) -> dict[str, LowRank]:
        """The products of what was decided, if all updates start where the factors will move."""
        starts = {one.start.digest: one.start for one in self._changes}
        if not self._measure or len(starts) > 1:
            return {}
        products = {}
        for start in starts.values():
            for name, (move_left, move_right) in factors.items():
                left, right = start.factors(name)
                scaled = np.hstack([move_left, left]) * start.spec.scale(name)
                products[name] = LowRank(scaled, np.vstack([right + move_right, move_right]))
        return products


def _decide(rule: CoordinateRule, members: Sequence[Change], key: str) -> tuple[Array, Array, int]:
    """One tensor: the decided change, each client's share summed over coordinates, and how many.

    Coordinates in which no two clients differ are decided by all and counted by none.
    """
    pairs = [(one.adapter.tensors[key].ravel(), one.start.tensors[key].ravel()) for one in members]
    size = len(pairs[0][0])
    decided, counted, deciding = np.zeros(size), np.zeros(len(members)), 0
    step = max(1, _NUMBERS // len(members))
    for first in range(0, size, step):
        part = slice(first, first + step)
        values = np.stack(
            [np.subtract(a[part], b[part], dtype=np.float64) for a, b in pairs], axis=1
        )
        decided[part] = values[:, 0]
        open_ = np.flatnonzero((values != values[:, :1]).any(axis=1))
        if len(open_):
            decided[part][open_], counts = _average(rule, values[open_])
            counted += counts
            deciding += len(open_)
    return decided, counted, deciding


def _average(rule: CoordinateRule, values: Array) -> tuple[Array, Array]:
    """The mean of the rule's window, (coordinates,), and each client's part of it, (n,), summed.

    Clients that say the same share the part of those that count among them.
    """
    ordered = np.sort(values, axis=1)
    first, width = rule.window(ordered)
    inside = first[:, None] + np.arange(width)
    kept = np.take_along_axis(ordered, inside, axis=1)
    low, high = kept[:, :1], kept[:, -1:]
    parts = ((values > low) & (values < high)).astype(np.float64)
    for edge in (low, high):
        same = values == edge
        parts[same] = np.broadcast_to(
            (kept == edge).sum(axis=1, keepdims=True) / same.sum(axis=1, keepdims=True), same.shape
        )[same]
    return kept.mean(axis=1), parts.sum(axis=0) / width
