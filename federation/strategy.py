"""Federated LoRA rounds as a Flower strategy, for any grid: local, Ray, or a SuperLink.

What Flower's own strategies lack and this one has: every round is checkpointed and a run goes on
where it was; waiting for clients and for replies has a deadline; updates are added to a running sum
as they come, so memory does not grow with the number of clients; a client that fails, is late or
sends nonsense is left out and its reason recorded, and never ends the run; clients are drawn by
their stable names, so every backend draws the same ones.

The clients' adapters may have other ranks than the global one: what they become is the recipe's
business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from aggregation.adapter import Adapter
from aggregation.recipes import recipe
from aggregation.state import GlobalState, initial_state
from aggregation.update import Update, UpdateError
from federation import cohort
from federation.checkpoint import Checkpoints
from federation.requests import Requests
from federation.rounds import LATE, Round, RoundsConfig
from protos import flower

_log = logging.getLogger("airpeft.federation.strategy")

Evaluate = Callable[[Adapter], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        adapter: the global adapter.
        state: adapter and residual, to go on from.
        rounds: the record of every round, the measurement before the first included.
    """

    adapter: Adapter
    state: GlobalState
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Reply:
    """One client's answer, as it came in: for whoever shows progress.

    Attributes:
        round: number of the round.
        client: its stable name.
        refused: why the answer is not used; empty if it is.
        seconds: from the request to the reply, waiting included.
    """

    round: int
    client: str
    refused: str = ""
    seconds: float = 0.0


class LoraStrategy(Strategy):  # type: ignore[misc]  # flwr is untyped here
    """Rounds of local LoRA training and exact aggregation.

    Args:
        config: how the run goes.
        initial: the adapter to start from.
        evaluate: measures an adapter on held-out examples; None for not at all.
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
        self._recipe = recipe(config.recipe)
        self._recipe.check_rounds()
        self._state = initial_state(initial)
        self._evaluate = evaluate
        self._on_round = on_round
        self._on_begin = on_begin
        self._on_reply = on_reply
        self._checkpoints = checkpoints
        self._clock = clock
        self._names: dict[int, str] = {}  # node id -> the client's stable name
        self._requests = Requests(clock)
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
            began = self._clock()
            requests = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            replies = grid.send_and_receive(requests, timeout=self._config.deadline_seconds)
            self.aggregate_train(number, replies)
            record = replace(self._round, metrics=self._measure(), seconds=self._clock() - began)
            self._finish(record, history)
        return TrainingResult(self._state.adapter, self._state, tuple(history))

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
        cfg = self._config
        nodes = self._present(grid)
        drawn = cohort.draw(nodes, server_round, cfg.fraction, cfg.sampling, cfg.seed)
        adapter = self._state.adapter
        self._requests = Requests(self._clock)
        self._round = Round(
            number=server_round,
            adapter_in=adapter.digest,
            adapter_out=adapter.digest,
            cohort=drawn,
            bytes_down=adapter.nbytes * len(drawn),
        )
        self._on_begin(server_round, drawn)
        task = flower.TrainTask(
            run=cfg.run,
            round=server_round,
            adapter=adapter,
            plan=cfg.plan,
            privacy=cfg.privacy,
            seed=cfg.seed,
            data_folder=cfg.data_folder,
            base=cfg.base,
        )
        return self._messages(flower.train_task_record(task), [(nodes[n], n) for n in drawn])

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add each reply to the running sum, then form the next adapter.

        Args:
            server_round: the round.
            replies: in any number and order; those that fail are recorded and left out.
        """
        reduction = self._recipe.begin(self._state)
        used: dict[str, Update] = {}
        refused: dict[str, str] = {}
        size = 0
        for reply, client, seconds in self._requests.match(replies):
            outcome = self._admit(reply, client, server_round)
            if isinstance(outcome, Update):
                size += outcome.adapter.nbytes
                try:
                    reduction.add(outcome)
                    # The sum has the tensors now; only the small fields are kept.
                    used[client] = replace(outcome, adapter=self._state.adapter)
                except UpdateError as error:
                    outcome = error.reason.value
            if isinstance(outcome, str):
                refused[client] = outcome
                _log.warning("round %d: %s is left out: %s", server_round, client, outcome)
            self._on_reply(Reply(server_round, client, refused.get(client, ""), seconds))
        refused.update({c: LATE for c in self._round.cohort if c not in used and c not in refused})
        self._round = replace(
            self._round,
            used=tuple(used),
            refused=dict(sorted(refused.items())),
            bytes_up=size,
            weights={client: update.weight for client, update in used.items()},
            privacy_events={c: dict(u.privacy_event) for c, u in used.items() if u.privacy_event},
            client_metrics={client: dict(update.metrics) for client, update in used.items()},
        )
        if len(used) < max(1, self._config.min_updates):
            _log.warning(
                "round %d: %d usable updates, %d are needed: the adapter stays as it was",
                server_round,
                len(used),
                self._config.min_updates,
            )
            return None, None
        self._state, report = reduction.finish()
        self._round = replace(
            self._round,
            adapter_out=self._state.adapter.digest,
            aggregation_error=report.error,
            kept_energy=report.energy,
        )
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the adapter is measured on held-out examples, not on the clients' own."""
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

    def _resume(self) -> list[Round]:
        found = self._checkpoints.latest() if self._checkpoints else None
        if found is None:
            return []
        history, self._state = found
        _log.info("run %s goes on after round %d", self._config.run, history[-1].number)
        return history

    def _finish(self, record: Round, history: list[Round]) -> None:
        if self._checkpoints:
            self._checkpoints.save(record, self._state)
        history.append(record)
        self._on_round(record)

    def _measure(self) -> Mapping[str, float]:
        return dict(self._evaluate(self._state.adapter)) if self._evaluate else {}

    def _present(self, grid: Grid) -> dict[str, int]:
        """Node id of every client that is there, by its stable name."""
        cfg = self._config
        wait = cfg.gather_seconds if not self._names else cfg.deadline_seconds
        wanted = cfg.clients if not self._names else 1
        nodes = cohort.gather(
            lambda: list(grid.get_node_ids()), wanted=wanted, seconds=wait, clock=self._clock
        )
        self._names = {node: name for node, name in self._names.items() if node in set(nodes)}
        unknown = [node for node in nodes if node not in self._names]
        if unknown:
            self._ask_names(grid, unknown)
        return {name: node for node, name in sorted(self._names.items(), reverse=True)}

    def _ask_names(self, grid: Grid, nodes: Sequence[int]) -> None:
        requests = Requests(self._clock)
        messages = [
            requests.add(Message(RecordDict(), dst_node_id=n, message_type=flower.IDENTITY), str(n))
            for n in nodes
        ]
        replies = grid.send_and_receive(messages, timeout=self._config.gather_seconds)
        for reply, node, _ in requests.match(replies):
            if not reply.has_content():
                continue  # asked again before the next round
            try:
                self._names[int(node)] = flower.identity_from(reply.content).client
            except flower.RecordError as error:
                _log.warning("node %s has no usable name: %s", node, error)

    def _messages(
        self, content: RecordDict, targets: Sequence[tuple[int, str]]
    ) -> Iterator[Message]:
        for node, client in targets:
            message = Message(content, dst_node_id=node, message_type=flower.TRAIN)
            yield self._requests.add(message, client)

    def _admit(self, reply: Message, client: str, number: int) -> Update | str:
        """The update, or why there is none."""
        if not reply.has_content():
            return flower.fault_of(reply)
        try:
            update = flower.update_from(reply.content)
        except flower.RecordError as error:
            _log.warning("round %d: %s sent a malformed reply: %s", number, client, error)
            return "malformed"
        if update.client != client:
            return "wrong-client"
        return update if update.round == number else "wrong-round"
