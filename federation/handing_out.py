"""What each client of a round is sent: its adapter, its assignment, no byte that it has already.

Clients differ in rank, in what they are asked to do, and in what they still have from an earlier
round. Those that agree in all three get the same message, which is made once. What a client still
has is what it was handed in a round whose update the server has used, so it must have got it; if
it has lost it since, it says so and is sent everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.errors import RecipeError
from aggregation.recipe import Recipe
from aggregation.secret_ring import Ring
from aggregation.spec import AdapterSpec
from aggregation.state import GlobalState
from federation.rounds import RoundsConfig
from protos import flower

HELD_ROUNDS = 8  # what a client got longer ago it may have forgotten, and so may we


@dataclass(frozen=True)
class Sent:
    """One message's content, and the bytes of the arrays in it."""

    content: RecordDict
    nbytes: int


class HandingOut:
    """Makes the tasks of a run, and remembers which client has which adapter.

    Args:
        config: the run's settings.
        recipe: of the run.
        max_rank: the largest rank that a client can train, by its name; 0 if it does not say.
    """

    def __init__(
        self, config: RoundsConfig, recipe: Recipe, max_rank: Callable[[str], int] = lambda _: 0
    ) -> None:
        self._config = config
        self._recipe = recipe
        self._max_rank = max_rank
        self._held: dict[str, tuple[int, Adapter]] = {}
        self._number = 0
        self._state: GlobalState | None = None
        self._handed: dict[str, Adapter] = {}  # by digest of the specification
        self._beside: tuple[Adapter, ...] = ()
        self._made: dict[tuple[str, ...], Sent] = {}
        self.ring: Ring | None = None  # of the round's secure sum, if it has one

    def begin(self, state: GlobalState, number: int, beside: tuple[Adapter, ...] = ()) -> None:
        """From now on, hand out this state, in this round.

        Args:
            state: of the server.
            number: of the round, from 1.
            beside: frozen adapters that go with every one that is handed out.
        """
        self._state, self._number, self._beside = state, number, beside
        self._handed, self._made = {}, {}
        self._held = {
            client: (when, adapter)
            for client, (when, adapter) in self._held.items()
            if number - when <= HELD_ROUNDS
        }

    @property
    def starts(self) -> Mapping[str, Adapter]:
        """What was handed out in this round, by digest."""
        return {adapter.digest: adapter for adapter in self._handed.values()}

    def adapter(self, client: str) -> Adapter:
        """What this client starts from.

        Raises:
            RecipeError: if the recipe has nothing for what the client can train.
        """
        assert self._state is not None  # noqa: S101 - begin comes first
        spec = self._spec(client)
        if spec.digest not in self._handed:
            self._handed[spec.digest] = self._recipe.hand_out(self._state, spec)
        return self._handed[spec.digest]

    def assignment(self, client: str) -> Assignment:
        """What this client does in this round."""
        spec, rank, widest = self._global(), self._rank(client), self._widest()
        share = None
        # Where all hold all rank indices, a client of rank r trains so many of them.
        if client in self._config.ranks:
            share = rank / widest
        elif rank < widest:
            share = min(rank / widest, self._recipe.assignment(self._number, spec).share)
        asked = self._recipe.assignment(self._number, spec, share=share)
        holdout = self._config.holdout
        return replace(asked, holdout=holdout) if holdout else asked

    def train(self, client: str, *, whole: bool = False) -> Sent:
        """The training task of a client.

        Args:
            client: its name.
            whole: whether nothing is left out, whatever the client is believed to have.

        Raises:
            RecipeError: if the recipe has nothing for what the client can train.
        """
        cfg, adapter, assignment = self._config, self.adapter(client), self.assignment(client)
        held = None if whole else self._holds(client, adapter.spec)
        key = ("train", adapter.digest, held.digest if held else "", str(assignment.share))
        if key not in self._made:
            task = flower.TrainTask(
                run=cfg.run,
                round=self._number,
                adapter=adapter,
                plan=cfg.plan,
                privacy=cfg.privacy,
                seed=cfg.seed,
                data_folder=cfg.data_folder,
                base=cfg.base,
                assignment=assignment.to_mapping(),
                codec=str(self._recipe.codec),
                beside=self._beside,
                secure=self.ring.to_mapping() if self.ring else {},
            )
            self._made[key] = _sent(flower.train_task_record(task, held))
        return self._made[key]

    def evaluate(self, client: str) -> Sent:
        """The task of measuring what this client has now, on the rows that it never trains on.

        Raises:
            RecipeError: if the recipe has nothing for what the client can train.
        """
        cfg, adapter, assignment = self._config, self.adapter(client), self.assignment(client)
        held = self._holds(client, adapter.spec)
        key = ("evaluate", adapter.digest, held.digest if held else "", str(assignment.share))
        if key not in self._made:
            task = flower.EvaluateTask(
                run=cfg.run,
                round=self._number,
                adapter=adapter,
                plan=cfg.plan,
                data_folder=cfg.data_folder,
                base=cfg.base,
                seed=cfg.seed,
                assignment=assignment.to_mapping(),
                beside=self._beside,
            )
            self._made[key] = _sent(flower.evaluate_task_record(task, held))
        return self._made[key]

    def keeps(self, client: str) -> None:
        """This client's update of this round is used: it has what it was handed in it."""
        self._held[client] = (self._number, self.adapter(client))

    def forget(self, client: str | None = None) -> None:
        """This client has lost what it was handed, or all have."""
        if client is None:
            self._held.clear()
        else:
            self._held.pop(client, None)

    def _holds(self, client: str, spec: AdapterSpec) -> Adapter | None:
        _, adapter = self._held.get(client, (0, None))
        return adapter if adapter is not None and adapter.spec == spec else None

    def _spec(self, client: str) -> AdapterSpec:
        """The specification of a client's adapter: the global one, at the client's own rank."""
        ours, rank = self._global(), self._rank(client)
        if rank >= self._widest() or self._recipe.assignment(self._number, ours).select:
            return ours  # which of the rank indices it trains, its assignment says
        if not self._recipe.distribute.mixed_ranks:
            raise RecipeError(
                f"client {client} can train rank {rank}, and recipe {self._recipe.name} hands out "
                f"rank {self._widest()} to everybody; choose svd-warm-start, which takes mixed "
                "ranks"
            )
        return ours.with_ranks({m.name: min(m.rank, rank) for m in ours.modules})

    def _global(self) -> AdapterSpec:
        assert self._state is not None  # noqa: S101 - begin comes first
        return self._state.adapter.spec

    def _widest(self) -> int:
        return max((module.rank for module in self._global().modules), default=1)

    def _rank(self, client: str) -> int:
        """What the settings give a client, as far as its device can train it."""
        rank = self._config.ranks.get(client, self._widest())
        return min(rank, self._max_rank(client) or rank)


def _sent(content: RecordDict) -> Sent:
    return Sent(content, flower.record_bytes(content))
