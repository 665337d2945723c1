"""Which pieces go together, as far as the server's memory, its protection and its basis go.

Rules as in :mod:`aggregation.soundness`: each gives a reason and the nearest sound choice, or
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aggregation.distributing import Same
from aggregation.refactoring import Keep, Svd
from aggregation.ridge import Ridge

if TYPE_CHECKING:
    from aggregation.recipe import Recipe


def trains_only_b(recipe: Recipe) -> bool:
    """Whether in every round clients train and send B, and all of it."""
    tasks = (recipe.train.assignment(number) for number in (1, 2))
    return all((task.trains, task.sends, task.select) == ("B", "B", "") for task in tasks)


def _entries_of_products(recipe: Recipe) -> str:
    if recipe.optimise.element_wise and not recipe.reduce.factors:
        return (
            f"optimise={recipe.optimise} has a rate for every entry of the factors, and reduce="
            f"{recipe.reduce} yields products, whose d_out x d_in entries are never made; choose "
            "optimise=momentum, or reduce=factor-mean with refactor=keep and distribute=same"
        )
    return ""


def _entries_in_a_turned_gauge(recipe: Recipe) -> str:
    if recipe.optimise.element_wise and recipe.refactor.turns:
        return (
            f"optimise={recipe.optimise} remembers squares of the entries of the factors, and "
            f"refactor={recipe.refactor} turns the factors: squares cannot be transported into "
            "another gauge; choose optimise=momentum, which is, or refactor=keep"
        )
    return ""


def _errors_in_a_turned_gauge(recipe: Recipe) -> str:
    if getattr(recipe.codec, "error_feedback", False) and recipe.refactor.turns:
        return (
            f"codec={recipe.codec} lets clients add what rounding took from their factors to the "
            f"next round's, and refactor={recipe.refactor} turns the factors in between; choose "
            "error_feedback=false, or refactor=keep with reduce=factor-mean and distribute=same"
        )
    return ""


def _correction_of_no_mean(recipe: Recipe) -> str:
    if isinstance(recipe.refactor, Ridge) and not recipe.reduce.factors:
        return (
            f"refactor=ridge corrects the mean of the factors, and reduce={recipe.reduce} yields "
            "products; choose reduce=factor-mean with distribute=same, or refactor=svd"
        )
    return ""


def _out_of_the_core(recipe: Recipe) -> str:
    if recipe.train.assignment(1).trains != "core":
        return ""
    if not isinstance(recipe.refactor, Keep):
        return (
            f"refactor={recipe.refactor} gives the factors another basis than the public one of "
            "train=core; choose refactor=keep"
        )
    if not isinstance(recipe.distribute, Same):
        return (
            f"distribute={recipe.distribute} hands out parts of B = left R, which are not of the "
            "basis of train=core; choose distribute=same"
        )
    if recipe.optimise.element_wise:
        return (
            f"optimise={recipe.optimise} moves each entry of B = left R at its own rate, out of "
            "the basis of train=core; choose optimise=momentum, or train=only-b"
        )
    return ""


def _secure_sum_of_what_is_no_sum(recipe: Recipe) -> str:
    if not getattr(recipe.private, "secure", False):
        return ""
    said = f"private={recipe.private} lets the server see sums only, and "
    if not recipe.reduce.linear:
        return said + (
            f"reduce={recipe.reduce} needs each client's own factors (stacking them, or looking at "
            "them one by one); choose reduce=factor-mean, or reduce=sketch, which is exact"
        )
    if recipe.refactor.needs_products:
        return said + (
            f"refactor={recipe.refactor} needs the exact mean of the products; choose "
            "refactor=keep, or reduce=sketch with refactor=svd"
        )
    if recipe.weigh.measured:
        return said + (
            f"weigh={recipe.weigh} needs to see each update; choose weigh=examples or weigh=uniform"
        )
    return ""


def _noise_after_something_else(recipe: Recipe) -> str:
    if not getattr(recipe.private, "central", False):
        return ""
    said = f"private={recipe.private} bounds and hides one client's part in a sum, and "
    if not recipe.reduce.linear:
        return said + (
            f"reduce={recipe.reduce} is none: after a step that is not linear, one client's part "
            "has no such bound; choose reduce=factor-mean with train=only-b, and an SVD or an "
            "optimiser after it is free"
        )
    if recipe.refactor.needs_products:
        return said + (
            f"refactor={recipe.refactor} also looks at the exact products, to which no noise is "
            "added; choose refactor=keep, or refactor=svd with train=only-b"
        )
    if not recipe.weigh.equal:
        return said + (
            f"with weigh={recipe.weigh} that part depends on a client's weight; choose "
            "weigh=uniform"
        )
    return ""


def lossless_svd(recipe: Recipe) -> bool:
    """Whether an SVD follows a mean of factors of which only B was trained: then it loses nothing.

    A is the same for all who start from the current adapter (others are refused), so the mean of
    the products is the product of the means, and its rank is r.
    """
    return isinstance(recipe.refactor, Svd) and recipe.reduce.factors and trains_only_b(recipe)


RULES = (
    _entries_of_products,
    _entries_in_a_turned_gauge,
    _errors_in_a_turned_gauge,
    _correction_of_no_mean,
    _out_of_the_core,
    _secure_sum_of_what_is_no_sum,
    _noise_after_something_else,
)
