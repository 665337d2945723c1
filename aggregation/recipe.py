"""Recipes: how updates become the next global adapter, as one choice for each of eight pieces.

    >>> from aggregation.distributing import Truncate
    >>> from aggregation.reducing import FactorMean
    >>> Recipe("mixed", reduce=FactorMean(), distribute=Truncate())
    Traceback (most recent call last):
    ...
    aggregation.errors.RecipeError: mixed: reduce=factor-mean averages ...

Use::

    reduction = recipe("svd-warm-start").begin(state)    # from aggregation.recipes
    for update in updates:
        try:
            reduction.add(update)
        except UpdateError as error:
            ...                      # this client is out; the round goes on
    state, report = reduction.finish()

A recipe that contradicts itself cannot be built. The named ones are in :mod:`aggregation.recipes`,
the choices in :mod:`aggregation.choices`, what does not go together in
:mod:`aggregation.soundness`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aggregation import choices, soundness
from aggregation.adapter import Adapter
from aggregation.combining import Reduction
from aggregation.distributing import Truncate
from aggregation.errors import RecipeError
from aggregation.pieces import ByExamples, Float32, NoPrivacy
from aggregation.reducing import ProductSum
from aggregation.refactoring import Svd
from aggregation.server_optimizer import Sgd
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from aggregation.train import Both


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
    train: Any = field(default_factory=Both)
    codec: Any = field(default_factory=Float32)
    weigh: Any = field(default_factory=ByExamples)
    reduce: Any = field(default_factory=ProductSum)
    private: Any = field(default_factory=NoPrivacy)
    optimise: Any = field(default_factory=Sgd)
    refactor: Any = field(default_factory=Svd)
    distribute: Any = field(default_factory=Truncate)
    reference: str = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse unsound products, with the reason and the nearest sound choice.

        Raises:
            RecipeError: at construction already, so a recipe that exists is sound.
        """
        for piece, allowed in choices.CHOICES.items():
            value = getattr(self, piece)
            if not isinstance(value, allowed):
                names = ", ".join(kind.__name__ for kind in allowed)
                raise RecipeError(f"{self.name}: {piece}={value!r} is not one of {names}")
        reason = soundness.objection(self)
        if reason:
            raise RecipeError(f"{self.name}: {reason}")

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

    def with_pieces(self, pieces: Mapping[str, str]) -> Recipe:
        """The same recipe with other choices, each as it is written in a scenario.

        Args:
            pieces: by piece, such as ``{"codec": "int8", "reduce": "krum(liars=2)"}``.

        Raises:
            RecipeError: if a choice is unknown, or the pieces no longer go together.
        """
        if not pieces:
            return self
        return replace(self, **{key: choices.read(key, text) for key, text in pieces.items()})

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
        return self.distribute.adapter(state, spec or state.adapter.spec)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """Properties, as ``airpeft recipes`` shows them."""
        svd = isinstance(self.refactor, Svd) and self.refactor.residual_rank > 0
        linear = bool(self.reduce.linear) and not self.refactor.beside
        return {
            "name": self.name,
            "pieces": {piece: str(getattr(self, piece)) for piece in choices.CHOICES},
            "exact": self.reduce.delta and self.reduce.weighted and (svd or self.refactor.beside),
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
        return f"{self.name}: " + " | ".join(str(getattr(self, p)) for p in choices.CHOICES)
