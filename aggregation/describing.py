"""What a recipe promises and costs, read off its pieces: the table of ``airpeft recipes``.

>>> from aggregation.recipes import recipe
>>> said = describe(recipe("ffa-lora"))
>>> said["exact"], said["secure_sum"], said["dp_friendly"], said["up"]
(True, True, True, 'r d_out')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aggregation.reducing import FactorMean
from aggregation.refactoring import Keep, Svd
from aggregation.sketching import Sketch
from aggregation.sparse import Sparse

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

PIECES = ("train", "codec", "weigh", "reduce", "private", "optimise", "refactor", "distribute")
ONE_FACTOR = ("A", "B", "core")


def describe(recipe: Recipe) -> dict[str, Any]:
    """The properties of a recipe.

    Returns:
        ``name``, ``pieces`` (as they are written), ``trains``, ``reference`` and ``warning``;

        * ``exact``: what is handed out next, with what is kept of it, is the weighted mean of the
          clients' products, up to rounding;
        * ``mixed_ranks``: clients may have adapters, or trainable parts of them, of several ranks;
        * ``linear``: the server needs nothing of the clients but weighted sums;
        * ``secure_sum``: so a secure sum can stand in for the server: what travels adds up too,
          and weights are known before updates are;
        * ``dp_friendly``: noise on what a client trains enters the model once, and not squared;
        * ``personal``: every client has a model of its own, and there is no global one;
        * ``up``, ``down``: numbers per module that a client sends and gets in a round.
    """
    task = recipe.train.assignment(1)
    noisy = bool(recipe.warning)
    linear = recipe.reduce.linear and not recipe.refactor.needs_products
    return {
        "name": recipe.name,
        "pieces": {piece: str(getattr(recipe, piece)) for piece in PIECES},
        "exact": _exact(recipe),
        "mixed_ranks": takes_mixed_ranks(recipe),
        "linear": linear,
        "secure_sum": linear and recipe.codec.linear and not recipe.weigh.measured,
        "dp_friendly": task.trains in ONE_FACTOR and linear and not noisy,
        "personal": recipe.train.personal,
        "trains": str(recipe.train),
        "up": _up(recipe),
        "down": _down(recipe),
        "reference": recipe.reference,
        "warning": recipe.warning,
    }


def takes_mixed_ranks(recipe: Recipe) -> bool:
    """Whether clients may have adapters, or trainable parts of them, of several ranks."""
    able = bool(recipe.reduce.mixed_ranks and recipe.distribute.mixed_ranks)
    return able or bool(recipe.train.assignment(1).select)


def _exact(recipe: Recipe) -> bool:
    reduce, refactor = recipe.reduce, recipe.refactor
    lossy = not recipe.codec.lossless or isinstance(recipe.distribute, Sparse) or recipe.warning
    noisy = getattr(recipe.private, "central", False)
    if lossy or noisy or recipe.train.personal or not (reduce.weighted and reduce.delta):
        return False
    if recipe.optimise.stateful:
        return False  # it hands out the mean and what it remembers of earlier ones
    if isinstance(reduce, FactorMean) and recipe.train.assignment(1).sends in ONE_FACTOR:
        # The other factor is common to all, so the mean has no more than the rank that there is.
        return isinstance(refactor, Keep) or (isinstance(refactor, Svd) and refactor.energy is None)
    if isinstance(reduce, Sketch):
        return False  # only if the sketch is wide enough for what the clients happen to send
    return bool(refactor.beside) or (
        not reduce.factors and isinstance(refactor, Svd) and refactor.residual_rank > 0
    )


def _up(recipe: Recipe) -> str:
    said = str(recipe.reduce.up) if isinstance(recipe.reduce, Sketch) else str(recipe.train.up)
    return said if recipe.codec.kind == "float32" else f"{said}, as {recipe.codec}"


def _down(recipe: Recipe) -> str:
    kept = isinstance(recipe.refactor, Keep)
    said = str(recipe.train.down if kept else recipe.refactor.down)
    if isinstance(recipe.distribute, Sparse):
        said = f"{recipe.distribute.density:g} {said}"
    return f"{said} + {recipe.reduce.down}" if isinstance(recipe.reduce, Sketch) else said
