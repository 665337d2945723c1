"""Training without rounds: FedBuff (Nguyen et al. 2022, 2106.06639, algorithm 1) over any grid.

A number of clients is always at work. Whoever is done is replaced by another at once, who gets the
newest adapter; whenever ``buffer`` usable updates have come in, they make a step, and that is a
new *version*. Nobody waits for the slowest. An update that was started some versions ago counts for
what it changed since *its* start, in product space, less than a fresh one
(:class:`aggregation.weighing.Staleness`); one from too long ago is refused.

A version is what elsewhere is a round: it is recorded, measured and made durable like one, together
with who is at work, so that a run which was interrupted goes on with the same clients from the
same starts.

Where clients are simulated, the time that they take is drawn from the seed and the server
waits for them in that order, so that the result depends neither on the machine nor on the number of
workers. Real clients are taken as they come.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from aggregation.adapter import Adapter
from aggregation.state import GlobalState
from federation import cohort, flights
from federation.closing import close
from federation.flights import Flight, Saved, simulated_seconds
from federation.intake import Expected, Intake, Reply
from federation.recipe_checks import buffer_size, expected_cohort
from federation.rounds import LATE, STALE, TOO_SMALL, UNREACHABLE, Round, RoundsConfig
from federation.strategy import LoraStrategy
from protos import flower

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 1.0
STALENESS = "staleness"

_log = logging.getLogger("airpeft.federation.buffered")


class BufferedStrategy(LoraStrategy):
    """Versions in place of rounds.

    Args:
        config: how the run goes; ``rounds`` is the number of versions, ``fraction`` the share of
            the clients that is at work at any time, ``deadline_seconds`` how long one of them may
            take.
        initial: the adapter to start from.
        pause: waits so many seconds between two looks at what has come.
        keywords: as for :class:`federation.strategy.LoraStrategy`.
    """

    def __init__(
        self,
        config: RoundsConfig,
        initial: Adapter,
        *,
        pause: Callable[[float], None] = time.sleep,
        **keywords: Any,
    ) -> None:
        super().__init__(config, initial, **keywords)
        self._pause = pause
        self._at_work = expected_cohort(config.clients, config.fraction, "fixed")
        self._size = buffer_size(config.buffer, config.clients, config.fraction)
        self._simulated = bool(config.data_folder)
        self._limit = self._recipe.weigh.max_staleness or 0
        self._flights: dict[str, Flight] = {}  # by client, in the order of asking
        self._ready: dict[str, Message] = {}  # replies that are there and not yet looked at
        self._versions: dict[int, Adapter] = {}
        self._asked: list[str] = []  # in this version
        self._now = 0.0
        self._found: Mapping[str, bytes] = {}

    def _resume(self) -> list[Round]:
        history = super()._resume()
        if history and self._checkpoints:
            self._found = self._checkpoints.kept(history[-1].number)
        return history

    def _one_round(self, grid: Grid, number: int) -> Round:
        """One version: keep clients at work until the buffer is full."""
        began = self._clock()
        self._nodes = self._roll_call.present(grid)
        taken = self._open_version(grid, number)
        self._on_begin(number, tuple(self._flights))
        while len(taken.used) < self._size and self._flights:
            self._land(taken, *self._next(grid))
            if len(taken.used) < self._size:
                self._fill(grid, number)
        self._close_version(number, taken)
        return replace(self._round, metrics=dict(self._measure()), seconds=self._clock() - began)

    def _open_version(self, grid: Grid, number: int) -> Intake:
        adapter = self._state.adapter
        self._bytes_down, self._asked = 0, []
        if not self._versions:
            self._take_up(grid)
        self._versions[number] = adapter
        oldest = number - self._limit
        self._versions = {v: one for v, one in self._versions.items() if v >= oldest}
        for client, flight in self._flights.items():
            if flight.version < oldest:
                self._flights[client] = replace(flight, start=None)
        self._handing.begin(self._state, number, self._beside())
        self._round = Round(number=number, adapter_in=adapter.digest, adapter_out=adapter.digest)
        starts = {f.start.digest: f.start for f in self._flights.values() if f.start is not None}
        taken = Intake(
            Expected(
                round=number,
                codec=str(self._recipe.codec),
                assignment=self._handing.assignment,
                start=lambda digest: None,
                small=adapter,
                privacy=self._config.local_privacy(),
            ),
            self._recipe.begin(self._state, starts=starts),
            self._on_reply,
        )
        self._intake = taken
        self._fill(grid, number)
        return taken

    def _fill(self, grid: Grid, number: int) -> None:
        """Put idle clients to work, each at most once in a version."""
        taken = self._taking()
        wanted = min(self._at_work, len(self._nodes))
        while len(self._flights) < wanted:
            busy = {*self._flights, *self._asked, *taken.used, *taken.refused}
            idle = [client for client in self._nodes if client not in busy]
            if not idle:
                return
            share, seed = 1.0 / len(idle), self._config.seed
            client = cohort.draw(idle, number, share, "fixed", seed)[0]
            finish = self._now + simulated_seconds(seed, client, number)
            if not self._can_train(client):
                taken.refuse(client, TOO_SMALL)
            elif self._ask(grid, client, number, finish):
                self._asked.append(client)
            else:
                taken.refuse(client, UNREACHABLE)

    def _ask(self, grid: Grid, client: str, version: int, finish: float) -> bool:
        """Send a client the adapter that the recipe hands out now; whether the grid took it."""
        task = self._handing.train(client, whole=True)
        message = Message(task.content, dst_node_id=self._nodes[client], message_type=flower.TRAIN)
        sent = next(iter(grid.push_messages([message])), None)
        if not sent:  # the node is gone, or the message too large: Flower's grids leave its id out
            return False
        self._bytes_down += task.nbytes
        self._flights[client] = Flight(
            client=client,
            version=version,
            finish=finish,
            message=sent,
            asked=self._clock(),
            assignment=self._handing.assignment(client),
            start=self._handing.adapter(client),
        )
        return True

    def _next(self, grid: Grid) -> tuple[Flight, Message | None]:
        """The next client that is done, with its reply; without one if it is late."""
        candidates = list(self._flights.values())
        if self._simulated:
            candidates = [min(candidates, key=lambda f: (f.finish, f.client))]
        waited, pause = self._clock(), FIRST_PAUSE
        while True:
            awaited = [f.message for f in candidates if f.message not in self._ready]
            for reply in grid.pull_messages(awaited):
                self._ready[reply.metadata.reply_to_message_id] = reply
            for flight in candidates:
                if flight.message in self._ready:
                    return flight, self._ready.pop(flight.message)
            for flight in candidates:
                # A simulated client may have queued for its lane behind others.
                since = waited if self._simulated else flight.asked
                if self._clock() - since > self._config.deadline_seconds:
                    self._give_up(grid, flight)
                    return flight, None
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _give_up(self, grid: Grid, flight: Flight) -> None:
        """Wait no longer; a grid of ours then frees what the client holds up."""
        abandon = getattr(grid, "abandon", None)
        if abandon is not None:
            abandon([flight.message])

    def _land(self, taken: Intake, flight: Flight, reply: Message | None) -> None:
        """Judge what a client has brought."""
        del self._flights[flight.client]
        self._now = max(self._now, flight.finish)
        behind = self._round.number - flight.version
        seconds = self._clock() - flight.asked
        start = flight.start
        reason = LATE if reply is None else STALE if start is None else ""
        if reply is None or start is None:
            if reply is not None and reply.has_content():
                taken.note_spent(reply, flight.client)
            taken.refuse(flight.client, reason)
            self._on_reply(Reply(self._round.number, flight.client, reason, seconds))
            return
        taken.expected = replace(
            taken.expected,
            round=flight.version,
            assignment=lambda _: flight.assignment,
            start={start.digest: start}.get,
        )
        taken.take([(reply, flight.client, seconds)])
        update = taken.used.get(flight.client)
        if update is not None:
            metrics = {**update.metrics, STALENESS: float(behind)}
            taken.used[flight.client] = replace(update, metrics=metrics)
        for client in taken.lacking:  # nothing was left out of its task
            taken.refuse(client, flower.ClientFault.MISSING_TENSORS.value)
        taken.lacking.clear()

    def _close_version(self, number: int, taken: Intake) -> None:
        """Make a step of the buffer, if it is worth one; the version is over in any case."""
        self._round, state = close(
            self._round, taken, min_updates=self._config.min_updates, bytes_down=self._bytes_down
        )
        self._round = replace(self._round, cohort=tuple(self._asked))
        # Delays are counted in versions, so that each one has to count, with a step or without.
        self._state = replace(state or self._state, round=number)

    def _kept(self) -> Mapping[str, bytes]:
        """Who is at work, for the checkpoint."""
        return flights.to_files(self._flights.values(), self._versions, self._now)

    def _take_up(self, grid: Grid) -> None:
        """After an interruption, ask those who were at work for the same once more."""
        saved = flights.from_files(self._found) if self._found else Saved()
        self._now, self._versions = saved.now, dict(saved.adapters or {})
        for client, version, finish in saved.flights:
            if client not in self._nodes:
                _log.warning("%s was at work and is gone", client)
                continue
            self._handing.begin(GlobalState(self._versions[version], round=version - 1), version)
            if not (self._can_train(client) and self._ask(grid, client, version, finish)):
                _log.warning("%s was at work and cannot be asked again", client)
        if saved.flights:
            _log.info("%d clients are at work again", len(self._flights))
