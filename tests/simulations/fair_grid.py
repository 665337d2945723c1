"""A grid on which whoever answers is in time, however slow the machine: late are those who hang."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from protos import flower
from simulations.grid import LocalGrid
from tests.waiting import until

MOMENT = 0.05  # seconds that are given to one who hangs


class FairGrid(LocalGrid):
    """Its clock stands still, except for clients that are at work and will not come back.

    Args:
        client_app: see :class:`LocalGrid`.
        clients: likewise.
        hung: where a client enters its name before it hangs.
    """

    def __init__(self, client_app: ClientApp, clients: int, *, hung: set[str], **more: Any) -> None:
        super().__init__(client_app, clients, clock=lambda: 0.0, **more)
        self._hung = hung

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        for name in ids:
            if name in self._pushed:
                self._settle(self._pushed[name])
        return super().pull_messages(ids)

    def _receive(self, pending: Any, deadline: float | None) -> Iterator[Message]:
        self._settle(pending)
        assert deadline is not None
        assert deadline > MOMENT
        yield from super()._receive(pending, deadline if pending.reply.done() else MOMENT)

    def _settle(self, pending: Any) -> None:
        """Wait until it is answered, or one who hangs is in the way."""
        until(
            lambda: pending.reply.done() or pending.lane in map(self._lane_of, tuple(self._hung)),
            every=0.002,
            what="an answer",
        )

    def _lane_of(self, client: str) -> int:
        numbers = {flower.client_name(n): n for n in range(self._clients)}
        return numbers[client] % len(self._lanes)

    def _replace(self, number: int) -> None:
        super()._replace(number)
        self._hung -= {client for client in self._hung if self._lane_of(client) == number}
