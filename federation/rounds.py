"""A training run's settings, and the record of one round.

    >>> config = RoundsConfig(run="demo", rounds=3, base="minilm", plan={"epochs": 1.0})
    >>> config.recipe, config.min_updates
    ('svd-warm-start', 1)
    >>> record = Round(number=1, adapter_in="sha256:a", adapter_out="sha256:b",
    ...                cohort=("client-00000",), used=("client-00000",))
    >>> Round.from_document(record.to_document()) == record
    True

Both are plain values: nothing here knows Flower, files or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.recipes import recipe
from federation.client_privacy import with_client_privacy
from federation.recipe_checks import RoundsError, check_recipe
from privacy.budget import LocalPrivacy
from privacy.central import CentralPrivacy

__all__ = ["LATE", "TOO_SMALL", "Round", "RoundsConfig", "RoundsError"]
LATE = "late"
TOO_SMALL = "max-rank"
STALE, UNREACHABLE = "stale", "unreachable"  # of recipes without rounds
# Fields that records of older versions do not have.
_LATER = {
    "bytes_measuring",
    "client_events",
    "influence",
    "measured",
    "personal",
    "secure",
    "unchanged",
}


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """How a training run goes.

    Attributes:
        run: name of the run; (run, client, round) names a privacy event once and for all.
        rounds: number of rounds.
        base: name of the base model, told to the clients.
        plan: the clients' training plan, passed on unread.
        privacy: the clients' local privacy, passed on unread; None for none.
        recipe: name of the aggregation recipe.
        pieces: choices to take instead of the recipe's own, by piece, as they are written.
        sampling: ``fixed`` or ``poisson``, see :mod:`federation.cohort`.
        fraction: share of the clients that is drawn each round, above 0 and at most 1.
        clients: how many clients to wait for before the first round.
        gather_seconds: how long to wait for them; a run goes on with those that came, unless
            there are none.
        min_updates: a round with fewer usable updates changes nothing.
        deadline_seconds: replies that come later are left out of their round.
        step_share: each step of a secure sum waits for at most this share of the deadline, and
            goes on with those who have answered; above 0 and at most 1.
        seed: root of every draw of the run.
        data_folder: where simulated clients find their examples; empty for real ones.
        ranks: rank of a client's adapter, by name; the others have the global adapter's.
        holdout: share of each client's own examples that never train; above 0, the round's clients
            measure the model that they have after it on them.
        trusted: name of the client that others are compared with, for a recipe that does so; it is
            asked in every round. Empty for none.
        buffer: how many updates make a step of a recipe without rounds; None for its own.
        max_staleness: such a recipe refuses updates that started more steps ago; None for its own.
        client_privacy: what is promised to every client as a whole; None for nothing. It has the
            ``rounds``, ``clients``, ``fraction`` and ``sampling`` of the run.

    Raises:
        RoundsError: if a number is out of its bounds, or the recipe cannot be used like this.
    """

    run: str
    rounds: int
    base: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] | None = None
    recipe: str = "svd-warm-start"
    pieces: Mapping[str, str] = field(default_factory=dict)
    sampling: str = "fixed"
    fraction: float = 1.0
    clients: int = 1
    gather_seconds: float = 120.0
    min_updates: int = 1
    deadline_seconds: float = 600.0
    step_share: float = 0.2
    seed: int = 0
    data_folder: str = ""
    ranks: Mapping[str, int] = field(default_factory=dict)
    holdout: float = 0.0
    trusted: str = ""
    buffer: int | None = None
    max_staleness: int | None = None
    client_privacy: CentralPrivacy | None = None

    def __post_init__(self) -> None:
        bounds = {
            "rounds": self.rounds >= 1,
            "fraction": 0 < self.fraction <= 1,
            "clients": self.clients >= 1,
            "min_updates": self.min_updates >= 1,
            "deadline_seconds": self.deadline_seconds > 0,
            "step_share": 0 < self.step_share <= 1,
            "sampling": self.sampling in ("fixed", "poisson"),
            "holdout": 0 <= self.holdout <= 0.9,
            "ranks": all(rank >= 1 for rank in self.ranks.values()),
        }
        for name, sound in bounds.items():
            if not sound:
                raise RoundsError(f"{name}={getattr(self, name)!r} is out of its bounds")
        if self.client_privacy is not None:
            for name in ("rounds", "clients", "fraction", "sampling"):
                mine, promised = getattr(self, name), getattr(self.client_privacy, name)
                if mine != promised:
                    raise RoundsError(f"client_privacy counts {name}={promised!r}, not {mine!r}")
        check_recipe(
            self.chosen(),
            clients=self.clients,
            fraction=self.fraction,
            sampling=self.sampling,
            trusted=self.trusted,
            mixed_ranks=len(set(self.ranks.values())) > 1,
            buffer=self.buffer,
            max_staleness=self.max_staleness,
            private=self.privacy is not None,
            min_updates=self.min_updates,
            holdout=self.holdout,
        )

    def local_privacy(self) -> LocalPrivacy | None:
        """What clients are asked to keep to; None for training without privacy.

        Raises:
            BudgetError: if it contradicts itself.
        """
        return LocalPrivacy.from_mapping(self.privacy) if self.privacy else None

    def chosen(self) -> Recipe:
        """The recipe with its replaced pieces.

        Raises:
            RoundsError: if there is none of that name, or its pieces do not go together.
        """
        try:
            chosen = recipe(self.recipe, self.pieces)
            if self.max_staleness is not None and chosen.weigh.max_staleness is not None:
                weigh = replace(chosen.weigh, max_staleness=self.max_staleness)
                chosen = replace(chosen, weigh=weigh)
        except RecipeError as error:
            raise RoundsError(str(error)) from error
        return with_client_privacy(
            chosen, self.client_privacy, pieces=self.pieces, min_updates=self.min_updates
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """What happened in one round; round 0 is the measurement before the first.

    Attributes:
        number: 1, 2, ... and 0 for the start.
        adapter_in: digest of the adapter that was handed out.
        adapter_out: digest of the adapter that came out; the same if too few updates came.
        cohort: clients that were asked, in order.
        used: clients whose update is in the result.
        refused: why each other one is not, by client: a reason, ``late``, a client's fault, or
            ``max-rank`` for a device that was not asked because the recipe has nothing so small.
        weights: weight of each used update, by client.
        privacy_events: what each client says it spent, by client; also of updates that were refused
            or given up, since they were sent.
        aggregation_error: relative distance from the exact mean to what is handed out, with what
            clients load beside the adapter, if they do.
        kept_energy: share of the mean's squared norm that is handed out.
        measured: whether those two are known; under a secure sum of factors, for one, they are not.
        bytes_down: bytes of all arrays that were sent to clients for training, repeats included.
        bytes_up: bytes of all arrays that came back, of refused updates too.
        metrics: of the new adapter on held-out examples.
        client_metrics: of each used client's training, by client.
        seconds: how long the round took; not reproducible, unlike everything else. (``bytes_down``
            may be larger in the first round after an interruption: a server that was away no
            longer knows what its clients still have.)
        personal: accuracy, loss and examples that clients measured on their own rows after the
            round, by client.
        bytes_measuring: bytes of all arrays that were sent to clients for that.
        influence: share of each used update in the result, by client: its part of the weights, or
            what a robust rule made of it.
        unchanged: why the adapter stayed as it was; empty if it did not.
        client_events: what the round spent on every client of the federation, as the server's
            ledger has it: one event, more if it was repeated with other updates.
        secure: of a secure sum: ``members`` and ``threshold`` of the last session, how many clients
            were ``summed`` and their ``weight``, the ``bound`` on the error of each value of their
            mean, ``dropped`` with step and reason by client, and why it was ``given_up``. The
            ``weights`` of single clients are then not known. Where clients add noise: ``least`` of
            them in a sum, of whom ``honest`` are counted on, and the ``share`` of each, in steps.
    """

    number: int
    adapter_in: str
    adapter_out: str
    cohort: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    privacy_events: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aggregation_error: float = 0.0
    kept_energy: float = 1.0
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    personal: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_measuring: int = 0
    influence: Mapping[str, float] = field(default_factory=dict)
    unchanged: str = ""
    client_events: tuple[Mapping[str, Any], ...] = ()
    secure: Mapping[str, Any] = field(default_factory=dict)
    measured: bool = True

    def to_document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Round:
        """The inverse of :meth:`to_document`.

        Raises:
            RoundsError: on a missing or unknown field.
        """
        names = {f.name for f in fields(cls)}
        if set(document) | _LATER != names:
            raise RoundsError(
                f"a round has exactly the fields {', '.join(sorted(names))}; "
                f"got {', '.join(sorted(document))}"
            )
        names = {"cohort", "used", "client_events"} & set(document)
        lists = {name: tuple(document[name]) for name in names}
        return cls(**{**document, **lists})
