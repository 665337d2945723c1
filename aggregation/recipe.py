"""Recipes: how updates become the next global adapter, as one choice for each of eight pieces.

    >>> print(recipe("fedit"))
    fedit: both | float32 | examples | factor-mean | none | sgd(1) | keep | same
    >>> Recipe("mixed", reduce=FactorMean(), distribute=Truncate())
    Traceback (most recent call last):
    ...
    aggregation.errors.RecipeError: mixed: reduce=factor-mean averages ...

Use::

    reduction = recipe("svd-warm-start").begin(state)
    for update in updates:
        try:
            reduction.add(update)
        except UpdateError as error:
            ...                      # this client is out; the round goes on
    state, report = reduction.finish()

A recipe that contradicts itself cannot be built. Adding one is adding an entry to ``RECIPES``; a
further choice of a piece is a further class in its module, and its rules in :meth:`Recipe.check`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from aggregation.adapter import Adapter
from aggregation.combining import Reduction
from aggregation.distributing import Distribute, Same, Truncate
from aggregation.errors import RecipeError
from aggregation.pieces import (
    Both,
    ByExamples,
    Codec,
    Float32,
    NoPrivacy,
    Private,
    Train,
    Uniform,
    Weigh,
)
from aggregation.reducing import FactorMean, ProductSum, Reduce
from aggregation.refactoring import Keep, Refactor, Svd
from aggregation.report import AggregationReport, ModuleReport
from aggregation.server_optimizer import Optimise, Sgd
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, StateError, initial_state

__all__ = [
    "DEFAULT",
    "RECIPES",
    "AggregationReport",
    "Both",
    "ByExamples",
    "FactorMean",
    "Float32",
    "GlobalState",
    "Keep",
    "ModuleReport",
    "NoPrivacy",
    "ProductSum",
    "Recipe",
    "RecipeError",
    "Reduction",
    "Same",
    "Sgd",
    "StateError",
    "Svd",
    "Truncate",
    "Uniform",
    "initial_state",
    "recipe",
]

_CHOICES: Mapping[str, tuple[type, ...]] = {
    "train": (Both,),
    "codec": (Float32,),
    "weigh": (ByExamples, Uniform),
    "reduce": (ProductSum, FactorMean),
    "private": (NoPrivacy,),
    "optimise": (Sgd,),
    "refactor": (Svd, Keep),
    "distribute": (Truncate, Same),
}


@dataclass(frozen=True)
class Recipe:
    """One choice of each piece. The defaults are the default recipe.

    Attributes:
        name: lower case, with hyphens.
        train: what clients train and send.
        codec: how values travel.
        weigh: weight of a client in the mean.
        reduce: many updates to one change.
        private: what protects clients at the reduce.
        optimise: what the server does with the change.
        refactor: from the new exact update back to factors of the global rank.
        distribute: what a client loads at its own rank.
        reference: where it comes from.

    Raises:
        RecipeError: if the pieces do not go together.
    """

    name: str
    train: Train = field(default_factory=Both)
    codec: Codec = field(default_factory=Float32)
    weigh: Weigh = field(default_factory=ByExamples)
    reduce: Reduce = field(default_factory=ProductSum)
    private: Private = field(default_factory=NoPrivacy)
    optimise: Optimise = field(default_factory=Sgd)
    refactor: Refactor = field(default_factory=Svd)
    distribute: Distribute = field(default_factory=Truncate)
    reference: str = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse unsound products, with the reason and the nearest sound choice.

        Raises:
            RecipeError: at construction already, so a recipe that exists is sound.
        """
        for piece, allowed in _CHOICES.items():
            value = getattr(self, piece)
            if not isinstance(value, allowed):
                names = ", ".join(kind.__name__ for kind in allowed)
                raise RecipeError(f"{self.name}: {piece}={value!r} is not one of {names}")
        if isinstance(self.reduce, FactorMean) and self.distribute.mixed_ranks:
            raise RecipeError(
                f"{self.name}: reduce=factor-mean averages B and A entry by entry, which needs the "
                "same rank everywhere, but distribute=truncate hands out several; choose "
                "distribute=Same(), or reduce=ProductSum() for mixed ranks"
            )
        if isinstance(self.reduce, FactorMean) and isinstance(self.refactor, Svd):
            raise RecipeError(
                f"{self.name}: refactor=svd turns the factors into another gauge, in which the "
                "mean of the factors of a client that started earlier means nothing; choose "
                "refactor=Keep(), or reduce=ProductSum()"
            )
        if isinstance(self.reduce, ProductSum) and isinstance(self.refactor, Keep):
            raise RecipeError(
                f"{self.name}: reduce=product-sum yields a matrix of a rank up to the sum of all "
                "clients' ranks, which refactor=keep cannot hold; choose refactor=Svd()"
            )

    def begin(
        self,
        state: GlobalState,
        *,
        starts: Mapping[str, Adapter] | None = None,
        measure: bool = True,
    ) -> Reduction:
        """Start an aggregation.

        Args:
            state: after the last round.
            starts: adapters by digest that clients may have started from, besides the current one
                and what :meth:`hand_out` makes of it; give earlier ones to accept stale updates.
            measure: whether a recipe that could do without also sums the exact products, so that
                the report can give the error.
        """
        return Reduction(self, state, starts, measure)

    def hand_out(self, state: GlobalState, spec: AdapterSpec | None = None) -> Adapter:
        """What a client with this specification starts the next round from.

        Raises:
            RecipeError: if the recipe or the global adapter has nothing for it.
        """
        return self.distribute.adapter(state, spec or state.adapter.spec)

    def describe(self) -> dict[str, Any]:
        """Properties, as ``airpeft recipes`` shows them."""
        exact = isinstance(self.reduce, ProductSum)
        return {
            "name": self.name,
            "pieces": {piece: str(getattr(self, piece)) for piece in _CHOICES},
            "exact": exact and isinstance(self.refactor, Svd) and self.refactor.residual_rank > 0,
            "mixed_ranks": self.reduce.mixed_ranks and self.distribute.mixed_ranks,
            "linear": isinstance(self.reduce, FactorMean),
            "secure_sum": isinstance(self.reduce, FactorMean),
            "trains": str(self.train),
            "up": "r D",
            "down": "r D",
            "in_rounds": True,
            "reference": self.reference,
        }

    def __str__(self) -> str:
        return f"{self.name}: " + " | ".join(str(getattr(self, piece)) for piece in _CHOICES)


DEFAULT = "svd-warm-start"
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        DEFAULT: Recipe(
            DEFAULT,
            reference="delta form with exact low-rank SVD; refactoring as FedMomentum "
            "(2603.08014, residual kept unmerged), balance as FedSVD (2505.12805)",
        ),
        "fedit": Recipe(
            "fedit",
            reduce=FactorMean(),
            refactor=Keep(),
            distribute=Same(),
            reference="FedIT (Zhang et al. 2023, 2305.05644), section 3",
        ),
    }
)


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        RecipeError: listing the names, with the nearest one first.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"no recipe {name!r}; {hint}allowed: {', '.join(RECIPES)}")
