"""The sections of a scenario, each a frozen model that checks itself to the last key.

    >>> Train(ranks=(4, 16, 8)).rank
    16
    >>> Federation(recipe="fedit", pieces={"weigh": "uniform"}).chosen().weigh
    Uniform()

Keys that came later say nothing while they are at their defaults: a scenario that does not use them
has the digest that it always had.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.recipes import DEFAULT, recipe
from privacy.budget import BudgetError, check_delta, check_epsilon, check_noise

Text = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Rank = Annotated[int, Field(ge=1, le=256)]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are refused.

    Attributes:
        later: keys that came after the first scenarios were written.
    """

    later: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def used(self) -> set[str]:
        """The keys that are not at their defaults."""
        plain = type(self).model_fields
        return {
            name
            for name, info in plain.items()
            if getattr(self, name) != info.get_default(call_default_factory=True)
        }


class Base(Section):
    """The frozen model.

    Attributes:
        name: a known base such as ``minilm``, a folder, or a model in the local cache.
    """

    name: Text = "minilm"


class Data(Section):
    """The rows.

    Attributes:
        dataset: name of a shipped data set; not used if there is a path.
        path: the user's own file; relative to the scenario's folder.
        text: column with the text.
        label: column with the class.
        labels: names of the classes, in order; empty to take them from the file.
        rows: use only so many rows; 0 for all.
        heldout: share of the rows kept out for measuring.
    """

    dataset: Text = "sentiment"
    path: str = ""
    text: Text = "text"
    label: Text = "label"
    labels: Names = ()
    rows: Annotated[int, Field(ge=0)] = 0
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Partition(Section):
    """Who has which rows; see :mod:`simulations.partition`."""

    scheme: Literal["iid", "dirichlet", "pathological", "natural", "size-skewed"] = "dirichlet"
    clients: Annotated[int, Field(ge=1, le=100_000)] = 20
    min_examples: Annotated[int, Field(ge=1)] = 20
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    classes: Annotated[int, Field(ge=1, le=1000)] = 1
    exponent: Annotated[float, Field(ge=0, le=10)] = 1.0
    column: str = ""

    @model_validator(mode="after")
    def _natural_needs_a_column(self) -> Self:
        if (self.scheme == "natural") != bool(self.column):
            raise ValueError("column is needed by scheme 'natural', and by no other")
        return self


# The keys of ``train`` that only some methods have a use for.
OF_METHODS = {
    "rank": ("lora",),
    "ranks": ("lora",),
    "alpha": ("lora",),
    "rslora": ("lora",),
    "targets": ("lora", "bottleneck"),
    "layers": ("lora", "ia3", "prefix", "bottleneck"),
    "virtual_tokens": ("prompt", "prefix"),
    "bottleneck": ("bottleneck",),
}


class Train(Section):
    """The adapter, and how each client trains it in one round.

    Attributes:
        rank: LoRA rank.
        ranks: of clients that differ: client i has ``ranks[i % n]``, and the global adapter the
            largest of them; empty for ``rank`` everywhere.
        alpha: LoRA alpha.
        layers: how many of the uppermost layers are adapted.
        targets: which projections.
        rslora: scale by sqrt(rank).
        epochs: passes over the client's rows in one round; may be a fraction.
        steps: steps in one round, instead of ``epochs``.
        batch_size: rows in a step; with privacy, the expected number (Poisson). 32 if neither
            this nor ``sample_rate`` is given.
        sample_rate: share of the client's rows in a step, instead of ``batch_size``: the same
            budget then means the same noise for every client.
        learning_rate: of the low-rank factors; the optimiser starts anew in every round.
        head_learning_rate: of the classifier's head; ``learning_rate`` if it is not given.
        optimizer: ``adamw`` or ``sgd``.
        max_length: tokens of a text that are read.
        holdout: share of every client's own rows that never train and measure its model after
            each round; by default 0.2 for a recipe without a global model, else none.
        method: ``lora``, ``ia3``, ``prompt``, ``prefix`` or ``bottleneck``.
        virtual_tokens: of a prompt or prefix; they come on top of ``max_length``.
        bottleneck: units in the middle of a bottleneck.
        physical_batch: at most so many rows go through the model at once; gradients of a larger
            batch are accumulated. By default as many as are quickest.
    """

    later: ClassVar[tuple[str, ...]] = (
        "ranks",
        "holdout",
        "method",
        "virtual_tokens",
        "bottleneck",
        "physical_batch",
    )
    rank: Rank = 8
    ranks: Annotated[tuple[Rank, ...], Field(strict=False, max_length=1000)] = ()
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    targets: Annotated[Names, Field(min_length=1)] = ("query", "value")
    rslora: bool = False
    epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_length: Annotated[int, Field(ge=4, le=512)] = 32
    holdout: Annotated[float, Field(ge=0, le=0.9)] | None = None
    method: Literal["lora", "ia3", "prompt", "prefix", "bottleneck"] = "lora"
    virtual_tokens: Annotated[int, Field(ge=1, le=256)] = 16
    bottleneck: Annotated[int, Field(ge=1, le=256)] = 16
    physical_batch: Annotated[int, Field(ge=1, le=65536)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _widest(cls, values: Any) -> Any:
        """Without a rank of its own, the global adapter has the largest of the clients' ranks."""
        ranks = values.get("ranks") if isinstance(values, dict) else None
        if isinstance(ranks, list | tuple) and all(type(rank) is int for rank in ranks) and ranks:
            return {"rank": max(ranks), **values}
        return values

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.ranks and self.rank != max(self.ranks):
            raise ValueError(
                f"rank = {self.rank} contradicts ranks = {list(self.ranks)}: leave rank out, the "
                "global adapter has the largest of the ranks"
            )
        return self

    @model_validator(mode="after")
    def _of_the_method(self) -> Self:
        for key in sorted(self.used & set(OF_METHODS)):
            if self.method not in OF_METHODS[key]:
                raise ValueError(
                    f"{key} is of no use to method {self.method!r}, only to "
                    f"{' and '.join(OF_METHODS[key])}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if self.batch_size is not None and self.sample_rate is not None:
            raise ValueError("give batch_size or sample_rate, not both")
        return self


class Privacy(Section):
    """Differential privacy of single examples, spent on the client (DP-SGD).

    Attributes:
        epsilon: budget of each client over the whole run; the noise is calibrated to it.
        noise_multiplier: the noise itself, if no budget is given.
        delta: of the guarantee; at most one over the largest client's rows.
        max_grad_norm: clipping norm of one example's gradient.
        accountant: how epsilon is computed: ``rdp`` (a safe bound) or ``pld`` (tight and slow).
    """

    epsilon: Annotated[float, Field(le=1000)] | None = None
    noise_multiplier: Annotated[float, Field(le=1000)] | None = None
    delta: float = 1e-5
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    accountant: Literal["rdp", "pld"] = "rdp"

    @field_validator("epsilon", "delta", "noise_multiplier")
    @classmethod
    def _that_protects(cls, value: float | None, info: ValidationInfo) -> float | None:
        """In words that say what to do, which the bounds of a field would not."""
        checks = {"epsilon": check_epsilon, "delta": check_delta, "noise_multiplier": check_noise}
        if value is not None:
            try:
                checks[str(info.field_name)](value)
            except BudgetError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon or noise_multiplier")
        return self


class Federation(Section):
    """How rounds are run.

    Attributes:
        rounds: how many.
        recipe: how updates become the next adapter; see ``airpeft recipes``.
        pieces: choices to take instead of the recipe's own, by piece, such as
            ``codec = "int8"`` or ``reduce = "krum(liars=2)"``.
        sampling: ``fixed`` draws the same number of clients each round, ``poisson`` flips a coin
            for each client.
        fraction: share of the clients that is drawn.
        min_updates: a round with fewer usable updates changes nothing.
        deadline_seconds: clients that are later are left out of the round.
        step_share: each step of a secure sum waits for at most this share of the deadline, and
            goes on with those who have answered.
        trusted: the client whose data are known to be good, by number or name, for a recipe that
            compares the others with it (``fltrust``); it takes part in every round.
        buffer: how many updates make a step, for a recipe without rounds (``fedbuff``).
        max_staleness: updates that started more steps ago are refused, for the same recipe.
    """

    later: ClassVar[tuple[str, ...]] = (
        "pieces",
        "trusted",
        "buffer",
        "max_staleness",
        "step_share",
    )
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    recipe: Text = DEFAULT
    pieces: dict[Text, Text] = Field(default_factory=dict)
    sampling: Literal["fixed", "poisson"] = "fixed"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_updates: Annotated[int, Field(ge=1)] = 1
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 86400)] = 600.0
    step_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    trusted: Annotated[int, Field(ge=0)] | Text | None = None
    buffer: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_staleness: Annotated[int, Field(ge=0, le=100_000)] | None = None

    @model_validator(mode="after")
    def _known_recipe(self) -> Self:
        self.chosen()
        return self

    def chosen(self) -> Recipe:
        """The recipe, with the pieces that are replaced.

        Raises:
            ValueError: naming the key, what was given and what is allowed.
        """
        try:
            recipe(self.recipe)
        except RecipeError as error:
            raise ValueError(f"federation.recipe: {error}") from None
        try:
            return recipe(self.recipe, self.pieces)
        except RecipeError as error:
            raise ValueError(f"federation.pieces: {error}") from None
