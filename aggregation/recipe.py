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

from aggregation import central_rules, choices, describing, named_tensors, soundness
from aggregation.adapter import Adapter
from aggregation.clipped_sum import Noise
from aggregation.codecs import Float32
from aggregation.combining import Reduction
from aggregation.core_basis import enter
from aggregation.distributing import Truncate
from aggregation.errors import RecipeError
from aggregation.pieces import ByExamples, FactorNoise, NoPrivacy
from aggregation.reducing import ProductSum
from aggregation.refactoring import Svd
from aggregation.secret_reduction import SecureReduction
from aggregation.server_optimizer import Sgd
from aggregation.sketching import Sketch
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState, initial_state
from aggregation.train import Assignment, Both


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

    def check_spec(self, spec: AdapterSpec) -> None:
        """Refuse adapters that the recipe would quietly do nothing to: those without factors.

        Raises:
            RecipeError: with the piece that needs factors, and recipes that do not.
        """
        reason = named_tensors.objection(self, spec)
        if reason:
            raise RecipeError(f"recipe {self.name}: {reason}")

    def check_base(self, quantised: bool) -> None:
        """Refuse to fold into a base that cannot hold what is folded in.

        Args:
            quantised: whether the base model's weights are stored in 8 bits or fewer.

        Raises:
            RecipeError: if the recipe says that its receiver merges the residual into such a base.
        """
        if quantised and getattr(self.refactor, "fold", False):
            raise RecipeError(
                f"{self.name}: refactor={self.refactor} is going to be merged into the base, and "
                "rounding to a quantised base is coarser than an update, which would be lost; "
                "choose fold=false, which applies the residual beside the base, or a base in "
                "bfloat16 or float32"
            )

    def start(self, adapter: Adapter) -> GlobalState:
        """The state before the first round.

        Args:
            adapter: what to start from; for train=core it is put into the public basis.

        Raises:
            StateError: if the adapter has values that are NaN or infinite.
            CoreError: if train=core cannot start from it without a loss.
        """
        task = self.train.assignment(1)
        in_basis = task.trains == "core" and adapter.is_finite()
        return initial_state(enter(adapter, task.seed) if in_basis else adapter)

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
        trusted: str = "",
        noise: Noise | None = None,
    ) -> Reduction:
        """Start an aggregation.

        Args:
            state: after the last round.
            starts: adapters by digest that clients may have started from, besides the current one
                and what :meth:`hand_out` makes of it; give earlier ones to accept stale updates.
            measure: whether a recipe that could do without also sums the exact products, so that
                the report can give the error.
            trusted: the client whose update the others are measured against, for a reduce that
                ``trusts`` (FLTrust); its update is checked like any other and not averaged.
            noise: where the noise of client-level privacy comes from, for what it costs; see
                :mod:`aggregation.clipped_sum`.

        Raises:
            RecipeError: if such a reduce has no trusted client, or another one has; if there is
                noise to add and none is given, or the other way round; or if the adapter is of a
                type that the recipe cannot aggregate.
        """
        self.check_spec(state.adapter.spec)
        if noise is not None and not getattr(self.private, "central", False):
            raise RecipeError(
                f"{self.name}: private={self.private} adds no noise to the sum, and would spend "
                "for nothing; choose private=client-dp, or leave noise out"
            )
        kind = SecureReduction if getattr(self.private, "secure", False) else Reduction
        return kind(self, state, starts, measure, trusted, noise)

    def hand_out(self, state: GlobalState, spec: AdapterSpec | None = None) -> Adapter:
        """What a client with this specification starts the next round from.

        Raises:
            RecipeError: if the recipe or the global adapter has nothing for it.
        """
        return self.distribute.adapter(state, spec or state.adapter.spec)  # type: ignore[no-any-return]

    def assignment(
        self, number: int, spec: AdapterSpec, *, share: float | None = None
    ) -> Assignment:
        """What a client does in a round: the word of train, and what reduce and private add.

        Args:
            number: of the round, from 1.
            spec: of the global adapter.
            share: of the rank indices that this client can train, for a recipe that chooses among
                them; None for the recipe's own.
        """
        asked: Assignment = self.train.assignment(number)
        if share is not None and asked.select:
            asked = replace(asked, share=share)
        if isinstance(self.reduce, Sketch):
            asked = replace(asked, sketch=self.reduce.columns(spec), seed=self.reduce.seed)
        if isinstance(self.private, FactorNoise):
            noise = self.private
            asked = replace(asked, noise_multiplier=noise.noise_multiplier, clip=noise.clip)
        return asked

    @property
    def warning(self) -> str:
        """What whoever chooses this recipe should know; empty if there is nothing."""
        return str(self.private.warning) or central_rules.advice(self)

    def describe(self) -> dict[str, Any]:
        """Properties, as ``airpeft recipes`` shows them; see :mod:`aggregation.describing`."""
        return describing.describe(self)

    def __str__(self) -> str:
        return f"{self.name}: " + " | ".join(str(getattr(self, p)) for p in choices.CHOICES)
