"""Which pieces go together. Each rule says why not, and the nearest sound choice.

A rule is a function from a recipe to a reason; an empty reason means that it has no objection. A
further rule is a further function in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep, Svd

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

Rule = Callable[["Recipe"], str]


def objection(recipe: Recipe) -> str:
    """The first reason against a combination, or nothing."""
    return next((reason for rule in RULES if (reason := rule(recipe))), "")


def _mean_of_mixed_ranks(recipe: Recipe) -> str:
    if isinstance(recipe.reduce, FactorMean) and recipe.distribute.mixed_ranks:
        return (
            "reduce=factor-mean averages B and A entry by entry, which needs the same rank "
            f"everywhere, but distribute={recipe.distribute} hands out several; choose "
            "distribute=same, or reduce=product-sum for mixed ranks"
        )
    return ""


def _mean_in_a_turned_gauge(recipe: Recipe) -> str:
    if isinstance(recipe.reduce, FactorMean) and isinstance(recipe.refactor, Svd | SvdFold):
        return (
            f"refactor={recipe.refactor} turns the factors into another gauge, in which the mean "
            "of the factors of a client that started earlier means nothing; choose refactor=keep, "
            "or reduce=product-sum"
        )
    return ""


def _idle_mean(recipe: Recipe) -> str:
    if isinstance(recipe.reduce, FactorMean) and isinstance(recipe.refactor, Fresh):
        return (
            "refactor=fresh throws the factors away and keeps their exact products, so averaging "
            "the factors is idle; choose reduce=product-sum, or refactor=mean-residual"
        )
    return ""


def _sum_that_does_not_fit(recipe: Recipe) -> str:
    if not isinstance(recipe.reduce, FactorMean) and isinstance(
        recipe.refactor, Keep | MeanResidual
    ):
        return (
            f"reduce={recipe.reduce} yields a matrix of a rank up to the sum of all clients' "
            f"ranks, which refactor={recipe.refactor} cannot hold; choose refactor=svd"
        )
    return ""


def _absolute_sum_kept(recipe: Recipe) -> str:
    if not recipe.reduce.delta and not isinstance(recipe.refactor, Svd):
        return (
            f"reduce={recipe.reduce} counts what a truncated client never held as zero, which "
            f"refactor={recipe.refactor} would keep for ever; choose reduce=product-sum"
        )
    return ""


RULES: tuple[Rule, ...] = (
    _mean_of_mixed_ranks,
    _mean_in_a_turned_gauge,
    _idle_mean,
    _sum_that_does_not_fit,
    _absolute_sum_kept,
)
