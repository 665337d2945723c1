"""Federated LoRA rounds as a Flower strategy, for any grid: local, Ray, or a SuperLink.

What Flower's own strategies lack and this one has: every round is checkpointed and a run goes on
where it was; waiting for clients and for replies has a deadline; updates are added to a running sum
as they come, so memory does not grow with the number of clients; a client that fails, is late or
sends nonsense is left out and its reason recorded, and never ends the run; clients are drawn by
their stable names, so every backend draws the same ones.

What a client gets is made in :mod:`federation.handing_out`, what it answers is judged in
:mod:`federation.intake`; what becomes of it all is the recipe's business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from aggregation.adapter import Adapter
from aggregation.beside import residual_adapters
from aggregation.combining import Reduction
from aggregation.errors import RecipeError
from aggregation.secure_pieces import ring_of
from aggregation.state import GlobalState
from federation import cohort, personal
from federation.checkpoint import Checkpoints
from federation.closing import close
from federation.handing_out import HandingOut
from federation.intake import Expected, Intake, Reply
from federation.requests import Requests
from federation.result import Evaluate, TrainingResult
from federation.roll_call import RollCall
from federation.rounds import TOO_SMALL, Round, RoundsConfig
from federation.secure_exchange import layout_of, sum_up
from federation.sketch_exchange import second_pass
from protos import flower

__all__ = ["Evaluate", "LoraStrategy", "Reply", "TrainingResult"]

_log = logging.getLogger("airpeft.federation.strategy")


class LoraStrategy(Strategy):  # type: ignore[misc]  # flwr is untyped here
    """Rounds of local LoRA training and exact aggregation.

    Args:
        config: how the run goes.
        initial: the adapter to start from.
        evaluate: measures an adapter, with the frozen ones beside it, on held-out examples; None
            for not at all.
        on_round: called after a round is durable.
        on_begin: called with the round's number and cohort before anybody is asked.
        on_reply: called for each reply.
        checkpoints: where rounds are made durable; None for nowhere.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        config: RoundsConfig,
        initial: Adapter,
        *,
        evaluate: Evaluate | None = None,
        on_round: Callable[[Round], None] = lambda _: None,
        on_begin: Callable[[int, tuple[str, ...]], None] = lambda _, __: None,
        on_reply: Callable[[Reply], None] = lambda _: None,
        checkpoints: Checkpoints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._recipe = config.chosen()
        self._state = self._recipe.start(initial)
        self._evaluate = evaluate
        self._on_round = on_round
        self._on_begin = on_begin
        self._on_reply = on_reply
        self._checkpoints = checkpoints
        self._clock = clock
        self._roll_call = RollCall(config, clock)
        self._handing = HandingOut(config, self._recipe, self._roll_call.max_rank)
        self._requests = Requests(clock)
        self._nodes: Mapping[str, int] = {}
        self._intake: Intake | None = None
        self._bytes_down = 0
        self._found_beside: tuple[GlobalState | None, tuple[Adapter, ...]] = (None, ())
        self._round = Round(number=0, adapter_in="", adapter_out="")

    def start(self, grid: Grid) -> TrainingResult:
        """Run all rounds that are not on disk yet.

        Args:
            grid: carries the messages.

        Raises:
            CohortError: if no client connects in time.
            CheckpointError: if the folder holds another run.
            StorageError: if a round can't be made durable; the run can be resumed.
        """
        self.summary()
        history = self._resume()
        if not history:
            digest = self._state.adapter.digest
            start = Round(number=0, adapter_in=digest, adapter_out=digest, metrics=self._measure())
            self._finish(start, history)
        for number in range(history[-1].number + 1, self._config.rounds + 1):
            self._finish(self._one_round(grid, number), history)
        return TrainingResult(self._state.adapter, self._state, tuple(history), self._beside())

    def _one_round(self, grid: Grid, number: int) -> Round:
        """Ask, add up, and measure what came out."""
        began = self._clock()
        self._exchange(grid, self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        self._ask_again(grid, number)
        self._bytes_down += self._further_passes(grid)
        self._close_round()
        metrics = dict(self._measure())
        metrics |= self._ask_for_measurements(grid, number)
        return replace(self._round, metrics=metrics, seconds=self._clock() - began)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the round's cohort and make a message for each of its clients, one at a time.

        Args:
            server_round: the round.
            arrays: not used: the strategy keeps the state, in double precision, itself.
            config: not used: the settings came with the strategy.
            grid: asked which nodes are there.
        """
        adapter = self._state.adapter
        self._nodes = self._roll_call.present(grid)
        self._handing.begin(self._state, server_round, self._beside())
        drawn = self._draw(server_round)
        able = tuple(client for client in drawn if self._can_train(client))
        reason = self._recipe.reduce.needs(len(able))
        if reason:
            _log.warning("round %d: nobody is asked: %s", server_round, reason)
            able = drawn = ()
        if getattr(self._recipe.private, "secure", False):
            self._handing.ring = ring_of(self._recipe, max(3, len(able)))
        self._requests = Requests(self._clock)
        self._bytes_down = 0
        self._round = Round(
            number=server_round, adapter_in=adapter.digest, adapter_out=adapter.digest, cohort=drawn
        )
        self._intake = self._new_intake(server_round)
        for client in drawn:
            if client not in able:
                self._intake.refuse(client, TOO_SMALL)
        self._on_begin(server_round, drawn)
        return self._messages(able)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add each reply to the running sum, then form the next adapter.

        Args:
            server_round: the round.
            replies: in any number and order; those that fail are recorded and left out.
        """
        self._taking().take(self._requests.match(replies))
        self._close_round()
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients measure at the end of a round, if they do, see ``personal``."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing, see :meth:`configure_evaluate`."""
        return None

    def summary(self) -> None:
        """One line to the log."""
        cfg = self._config
        _log.info(
            "run %s: %d rounds, recipe %s, sampling %s %.3g, privacy %s",
            cfg.run,
            cfg.rounds,
            self._recipe,
            cfg.sampling,
            cfg.fraction,
            dict(cfg.privacy) if cfg.privacy else "none",
        )

    def _new_intake(self, number: int) -> Intake:
        expected = Expected(
            round=number,
            codec=str(self._recipe.codec),
            assignment=self._handing.assignment,
            start=lambda digest: self._handing.starts.get(digest),
            small=self._state.adapter,
            secure=self._handing.ring is not None,
            privacy=self._config.local_privacy(),
        )
        return Intake(expected, self._reduction(), self._on_reply)

    def _reduction(self) -> Reduction:
        return self._recipe.begin(self._state, trusted=self._config.trusted)

    def _draw(self, number: int) -> tuple[str, ...]:
        """Who is asked in a round."""
        cfg = self._config
        drawn = cohort.draw(self._nodes, number, cfg.fraction, cfg.sampling, cfg.seed)
        trusted = {cfg.trusted} & set(self._nodes)
        return tuple(sorted({*drawn, *trusted})) if trusted else drawn

    def _taking(self) -> Intake:
        assert self._intake is not None  # noqa: S101 - configure_train comes first
        return self._intake

    def _exchange(self, grid: Grid, messages: Iterable[Message]) -> None:
        """Send messages and judge what comes back."""
        replies = grid.send_and_receive(messages, timeout=self._config.deadline_seconds)
        self._taking().take(self._requests.match(replies))

    def _further_passes(self, grid: Grid) -> int:
        """What the recipe needs of the clients once they have trained; gives the bytes sent."""
        taken, ring = self._taking(), self._handing.ring
        if ring is None:
            return second_pass(grid, taken, self._nodes, self._config, self._clock)
        layout = layout_of(self._recipe, self._state, ring)
        return sum_up(grid, taken, self._nodes, self._config, layout, self._clock)

    def _ask_again(self, grid: Grid, number: int) -> None:
        """Clients that have lost what they were believed to have get everything, once."""
        lacking = list(self._taking().lacking)
        for client in lacking:
            self._handing.forget(client)
        if lacking:
            _log.info("round %d: %d clients get everything again", number, len(lacking))
            self._exchange(grid, self._messages(lacking))

    def _close_round(self) -> None:
        """Form the next adapter of what is in the sum, if that is enough."""
        taken = self._taking()
        self._round, state = close(
            self._round,
            taken,
            min_updates=self._config.min_updates,
            bytes_down=self._bytes_down,
            beside=self._recipe.refactor.beside,
        )
        for client in taken.used:
            self._handing.keeps(client)
        # Rounds count with a step or without: who trains which factor depends on their number.
        self._state = replace(state or self._state, round=self._round.number)

    def _ask_for_measurements(self, grid: Grid, number: int) -> dict[str, float]:
        """Have the round's clients measure what they have now, on the rows kept out for it."""
        if not self._config.holdout or not self._round.used:
            return {}
        self._handing.begin(self._state, number, self._beside())
        found = personal.measure(
            grid,
            [(self._nodes[client], client) for client in self._round.used],
            self._handing,
            round=number,
            timeout=self._config.deadline_seconds,
            clock=self._clock,
        )
        self._round = replace(self._round, personal=found.clients, bytes_measuring=found.bytes_down)
        return found.mean()

    def _resume(self) -> list[Round]:
        found = self._checkpoints.latest() if self._checkpoints else None
        if found is None:
            return []
        history, self._state = found
        _log.info("run %s goes on after round %d", self._config.run, history[-1].number)
        return history

    def _finish(self, record: Round, history: list[Round]) -> None:
        if self._checkpoints:
            self._checkpoints.save(record, self._state, self._kept())
        history.append(record)
        self._on_round(record)

    def _kept(self) -> Mapping[str, bytes]:
        """Further files of the checkpoint."""
        return {}

    def _measure(self) -> Mapping[str, float]:
        if self._evaluate is None:
            return {}
        return self._evaluate(self._state.adapter, self._beside())

    def _beside(self) -> tuple[Adapter, ...]:
        """What belongs to the adapter of the current state, computed once for each state."""
        if self._found_beside[0] is not self._state:
            kept = self._recipe.refactor.beside
            self._found_beside = (self._state, residual_adapters(self._state) if kept else ())
        return self._found_beside[1]

    def _can_train(self, client: str) -> bool:
        try:
            self._handing.adapter(client)
        except RecipeError as error:
            _log.warning("%s", error)
            return False
        return True

    def _messages(self, clients: Sequence[str]) -> Iterator[Message]:
        for client in clients:
            task = self._handing.train(client)
            self._bytes_down += task.nbytes
            node = self._nodes[client]
            message = Message(task.content, dst_node_id=node, message_type=flower.TRAIN)
            yield self._requests.add(message, client)
