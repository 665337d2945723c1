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
from aggregation.folding import Fresh, MeanResidual, SvdFold
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
from aggregation.reducing import FactorMean, ProductSum, RankMean
from aggregation.refactoring import Keep, Svd
from aggregation.report import AggregationReport, ModuleReport
from aggregation.robust import GeometricMedian
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
    "Fresh",
    "GeometricMedian",
    "GlobalState",
    "Keep",
    "MeanResidual",
    "ModuleReport",
    "NoPrivacy",
    "ProductSum",
    "RankMean",
    "Recipe",
    "RecipeError",
    "Reduction",
    "Same",
    "Sgd",
    "StateError",
    "Svd",
    "SvdFold",
    "Truncate",
    "Uniform",
    "initial_state",
    "recipe",
]

Reduce = ProductSum | RankMean | GeometricMedian | FactorMean
Refactor = Svd | Keep | SvdFold | MeanResidual | Fresh

_CHOICES: Mapping[str, tuple[type, ...]] = {
    "train": (Both,),
    "codec": (Float32,),
    "weigh": (ByExamples, Uniform),
    "reduce": (ProductSum, RankMean, GeometricMedian, FactorMean),
    "private": (NoPrivacy,),
    "optimise": (Sgd,),
    "refactor": (Svd, Keep, SvdFold, MeanResidual, Fresh),
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
        if isinstance(self.reduce, FactorMean) and isinstance(self.refactor, Svd | SvdFold):
            raise RecipeError(
                f"{self.name}: refactor={self.refactor} turns the factors into another "
                "gauge, in which the mean of the factors of a client that started earlier means "
                "nothing; choose refactor=Keep(), or reduce=ProductSum()"
            )
        if isinstance(self.reduce, FactorMean) and isinstance(self.refactor, Fresh):
            raise RecipeError(
                f"{self.name}: refactor=fresh throws the factors away and keeps their exact "
                "products, so averaging the factors is idle; choose reduce=ProductSum(), or "
                "refactor=MeanResidual()"
            )
        if not isinstance(self.reduce, FactorMean) and isinstance(
            self.refactor, Keep | MeanResidual
        ):
            raise RecipeError(
                f"{self.name}: reduce={self.reduce} yields a matrix of a rank up to the sum of all "
                f"clients' ranks, which refactor={self.refactor} cannot hold; choose "
                "refactor=Svd()"
            )
        if not self.reduce.delta and not isinstance(self.refactor, Svd):
            raise RecipeError(
                f"{self.name}: reduce=product-sum(absolute) counts what a truncated client never "
                f"held as zero, which refactor={self.refactor} would keep for ever; choose "
                "reduce=ProductSum()"
            )

    def check_rounds(self) -> None:
        """Refuse a recipe that clients cannot follow over rounds.

        Raises:
            RecipeError: if what it keeps beside the adapter would have to reach the clients, whose
                base it belongs to, but only the adapter does.
        """
        if self.refactor.beside:
            raise RecipeError(
                f"recipe {self.name} keeps a residual that every client has to load beside the "
                "adapter, and rounds hand out the adapter alone; choose svd-warm-start, whose "
                "residual re-enters on the server (airpeft aggregate runs either)"
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
        svd = isinstance(self.refactor, Svd) and self.refactor.residual_rank > 0
        weighted = isinstance(self.reduce, ProductSum | FactorMean) and self.reduce.delta
        linear = isinstance(self.reduce, FactorMean) and not self.refactor.beside
        return {
            "name": self.name,
            "pieces": {piece: str(getattr(self, piece)) for piece in _CHOICES},
            "exact": weighted and (svd or self.refactor.beside),
            "mixed_ranks": self.reduce.mixed_ranks and self.distribute.mixed_ranks,
            "linear": linear,
            "secure_sum": linear,
            "trains": str(self.train),
            "up": "r D",
            "down": self.refactor.down,
            "in_rounds": not self.refactor.beside,
            "reference": self.reference,
        }

    def __str__(self) -> str:
        return f"{self.name}: " + " | ".join(str(getattr(self, piece)) for piece in _CHOICES)


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
