"""Who is there: the clients' stable names, and what their devices can train.

Flower knows nodes by numbers that change whenever a client connects anew. Everything else here
goes by the name that a client gives itself, so it is asked for once per node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from federation import cohort
from federation.requests import Requests
from federation.rounds import RoundsConfig
from protos import flower

_log = logging.getLogger("airpeft.federation.roll_call")


class RollCall:
    """The clients that are there now.

    Args:
        config: how long to wait, and for how many.
        clock: seconds that only grow.
    """

    def __init__(self, config: RoundsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._known: dict[int, flower.Identity] = {}  # by node

    def present(self, grid: Grid) -> dict[str, int]:
        """The node of every client that is there, by its stable name.

        The first call waits for all clients that the settings announce, later ones for any.

        Raises:
            CohortError: if there is none when the time is up.
        """
        cfg = self._config
        wait = cfg.gather_seconds if not self._known else cfg.deadline_seconds
        wanted = cfg.clients if not self._known else 1
        nodes = cohort.gather(
            lambda: list(grid.get_node_ids()), wanted=wanted, seconds=wait, clock=self._clock
        )
        there = set(nodes)
        self._known = {node: who for node, who in self._known.items() if node in there}
        unknown = [node for node in nodes if node not in self._known]
        if unknown:
            self._ask(grid, unknown)
        return {who.client: node for node, who in sorted(self._known.items(), reverse=True)}

    def max_rank(self, client: str) -> int:
        """The largest rank that a client's device says it can train; 0 if it says nothing."""
        return next((who.max_rank for who in self._known.values() if who.client == client), 0)

    def _ask(self, grid: Grid, nodes: Sequence[int]) -> None:
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
                self._known[int(node)] = flower.identity_from(reply.content)
            except flower.RecordError as error:
                _log.warning("node %s has no usable name: %s", node, error)
