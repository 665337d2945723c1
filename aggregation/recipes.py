"""The recipes by name.

    >>> print(recipe("fedit"))
    fedit: both | float32 | examples | factor-mean | none | sgd | keep | same
    >>> print(recipe("fedit", {"weigh": "uniform"}).weigh)
    uniform

Adding one is adding an entry to ``RECIPES``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from aggregation.distributing import Same
from aggregation.errors import RecipeError
from aggregation.folding import Fresh, MeanResidual, SvdFold
from aggregation.recipe import Recipe
from aggregation.reducing import FactorMean, ProductSum, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.robust import GeometricMedian

DEFAULT = "svd-warm-start"
_ALL = (
    Recipe(
        DEFAULT,
        reference="delta form with exact low-rank SVD; refactoring as FedMomentum "
        "(2603.08014, residual kept unmerged), balance as FedSVD (2505.12805)",
    ),
    Recipe(
        "fedit",
        reduce=FactorMean(),
        refactor=Keep(),
        distribute=Same(),
        reference="FedIT (Zhang et al. 2023, 2305.05644), section 3",
    ),
    Recipe("flora", refactor=Fresh(), reference="FLoRA (Wang et al. 2024, 2409.05976)"),
    Recipe(
        "fedex-lora",
        reduce=FactorMean(),
        refactor=MeanResidual(),
        distribute=Same(),
        reference="FedEx-LoRA (Singhal et al. 2025, 2410.09432)",
    ),
    Recipe("fedmomentum", refactor=SvdFold(), reference="FedMomentum (2603.08014)"),
    Recipe(
        "flexlora",
        reduce=ProductSum(delta=False),
        refactor=Svd(residual_rank=0),
        reference="FlexLoRA (Bai et al. 2024, 2402.11505)",
    ),
    Recipe(
        "florist",
        reduce=ProductSum(delta=False),
        refactor=Svd(residual_rank=0, energy=0.9),
        reference="FLoRIST (2506.09199), section 3",
    ),
    Recipe(
        "raflora",
        reduce=RankMean(),
        refactor=Svd(residual_rank=0),
        reference="raFLoRA (2602.13486)",
    ),
    Recipe(
        "rfa",
        reduce=GeometricMedian(),
        reference="RFA (Pillutla et al. 2022, 1912.13445), algorithm 2, in product space",
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({chosen.name: chosen for chosen in _ALL})


def recipe(name: str, pieces: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name.

    Args:
        name: of ``RECIPES``.
        pieces: choices to take instead of the recipe's own, see :meth:`Recipe.with_pieces`.

    Raises:
        RecipeError: listing the names, with the nearest one first; or if the pieces do not go
            together.
    """
    if name in RECIPES:
        return RECIPES[name].with_pieces(pieces or {})
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"no recipe {name!r}; {hint}allowed: {', '.join(RECIPES)}")
