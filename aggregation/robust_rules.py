"""The reduce piece against clients that lie: rules that choose updates by their neighbours.

An update is believed if many others are near it. Distances are those of whole products, see
:mod:`aggregation.robust`. The clients' weights are not used, as in the papers: a client could claim
any, and the theory counts heads.

>>> line = np.array([0.0, 1.0, 2.5, 3.0, 50.0])
>>> krum_order(np.subtract.outer(line, line) ** 2, liars=1).tolist()
[2, 1, 3, 0, 4]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation.errors import RecipeError
from aggregation.low_rank import Array
from aggregation.robust import ProductRule, Weighed
from aggregation.robust_gram import Change, Changes


def krum_order(squared: Array, liars: int) -> npt.NDArray[np.intp]:
    """Updates from the most to the least believed, by the sum of their nearest squared distances.

    Blanchard et al. 2017 (1703.02757), section 4: the n - f - 2 nearest others count. (At least one
    does, which matters only in the last steps of Bulyan.) Where two scores are equal, as those of
    each other's only neighbour, the distances to all others decide and then the order: it takes
    identical updates for their order to play a part.

    Args:
        squared: squared distances, (n, n).
        liars: f.

    Returns:
        Indices, of shape (n,).
    """
    near = max(1, len(squared) - liars - 2)
    others = squared.copy()
    np.fill_diagonal(others, np.inf)
    nearest = np.partition(others, near - 1, axis=1)[:, :near]
    return np.lexsort((squared.sum(axis=1), nearest.sum(axis=1)))


def bulyan_choice(squared: Array, liars: int) -> list[int]:
    """The updates that Bulyan's first stage selects.

    El Mhamdi et al. 2018 (1802.07927), section 4: Krum chooses one, which is taken out, and again
    among the rest, until theta = n - 2 f are chosen. (Taking the theta best of one Krum, as some
    public code does, is another rule: scores change as neighbours leave.)

    Args:
        squared: squared distances, (n, n).
        liars: f.
    """
    left = list(range(len(squared)))
    chosen: list[int] = []
    while len(chosen) < len(squared) - 2 * liars:
        best = int(krum_order(squared[np.ix_(left, left)], liars)[0])
        chosen.append(left.pop(best))
    return chosen


def check_liars(kind: str, liars: int) -> None:
    """Refuse a number of liars that no rule is for.

    Raises:
        RecipeError: if it is below 1.
    """
    if liars < 1:
        raise RecipeError(
            f"{kind}: liars={liars} must be 1 or more; where nobody lies, choose "
            "reduce=product-sum, the plain mean"
        )


def too_few(kind: str, liars: int, expected: int, times: int) -> str:
    """Why a rule for so many liars does not take so few updates; empty if it does.

    Args:
        kind: name of the rule.
        liars: f.
        expected: number of updates.
        times: the rule needs ``times * f + 3``.
    """
    least = times * liars + 3
    if expected >= least:
        return ""
    possible = (expected - 3) // times
    remedy = f"set liars={possible}" if possible >= 1 else "choose reduce=geometric-median"
    return (
        f"reduce={kind} with liars={liars} needs at least {least} updates ({times} f + 3), and "
        f"there are {expected}; ask more clients, or {remedy}"
    )


@dataclass(frozen=True)
class Krum(ProductRule):
    """Reduce: the one update with the nearest neighbours (Blanchard et al. 2017, 1703.02757, 4).

    The score of an update is the sum of squared distances to its n - f - 2 nearest others; the
    least one is the result. For f liars it needs n >= 2 f + 3. One honest update is far noisier
    than a mean of many: :class:`MultiKrum` is the usual choice.

    Attributes:
        liars: f, how many clients may lie.

    Raises:
        RecipeError: if it is below 1.
    """

    liars: int = 1
    kind = "krum"

    def __post_init__(self) -> None:
        check_liars(self.kind, self.liars)

    def needs(self, expected: int) -> str:
        """2 f + 3 updates."""
        return too_few(self.kind, self.liars, expected, 2)

    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """All for the best one."""
        return _mean_of(krum_order(changes.squared, self.liars)[:1], len(prior))


@dataclass(frozen=True)
class MultiKrum(ProductRule):
    """Reduce: the mean of the updates with the nearest neighbours (1703.02757, section 4).

    Scores as for :class:`Krum`; the m best are averaged, each the same. It needs n >= 2 f + 3. The
    paper leaves m open, between the robustness of m = 1 and the speed of m = n; by default we take
    n - f, as many as there are honest clients at least. More is refused.

    Attributes:
        liars: f, how many clients may lie.
        chosen: m; 0 for n - f.

    Raises:
        RecipeError: if the first is below 1, or the second below 0.
    """

    liars: int = 1
    chosen: int = 0
    kind = "multi-krum"

    def __post_init__(self) -> None:
        check_liars(self.kind, self.liars)
        if self.chosen < 0:
            raise RecipeError(
                f"multi-krum: chosen={self.chosen} must be 0 (all but the liars) or more"
            )

    def needs(self, expected: int) -> str:
        """2 f + 3 updates, and f more than are chosen."""
        if self.chosen and self.chosen + self.liars > expected:
            return (
                f"reduce=multi-krum chooses {self.chosen} of {expected} updates, of which "
                f"liars={self.liars} may lie; set chosen to {max(0, expected - self.liars)} at "
                "most, or to 0 for just that"
            )
        return too_few(self.kind, self.liars, expected, 2)

    def weigh(self, changes: Changes, prior: Array, root: Change | None) -> Weighed:
        """The same for each of the best."""
        count = self.chosen or len(prior) - self.liars
        return _mean_of(krum_order(changes.squared, self.liars)[:count], len(prior))


def _mean_of(members: npt.NDArray[np.intp], count: int) -> Weighed:
    weights = np.zeros(count)
    weights[members] = 1.0 / len(members)
    return Weighed(weights, weights)
