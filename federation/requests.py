"""Who was asked in a round, and which reply is whose.

A client is known by the message that its reply answers: the sender field of an error is the
server's own. Flower's grids give a message its id only when they send it, so the metadata objects
are kept and their ids read when replies come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Message


class Requests:
    """The messages of one exchange, in order.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: list[tuple[Any, str, float]] = []  # (metadata, client, when)

    def add(self, request: Message, client: str) -> Message:
        """Note that this message is for this client; hands the message back."""
        self._asked.append((request.metadata, client, self._clock()))
        return request

    def match(self, replies: Iterable[Message]) -> Iterator[tuple[Message, str, float]]:
        """Each reply with its client and the seconds since that client was asked.

        A grid that hands out replies one by one keeps their order itself; one that returns them
        all gets them sorted by request, since floating-point sums depend on the order. A reply
        that answers none of the messages, or one that is answered already, is dropped.
        """
        if isinstance(replies, list | tuple):
            order = {name: index for index, name in enumerate(self._known())}
            replies = sorted(
                replies, key=lambda r: order.get(r.metadata.reply_to_message_id, len(order))
            )
        known: dict[str, tuple[str, float]] = {}
        answered = set()
        for reply in replies:
            name = reply.metadata.reply_to_message_id
            if name not in known:
                known = self._known()
            if name in known and name not in answered:
                answered.add(name)
                client, when = known[name]
                yield reply, client, self._clock() - when

    def _known(self) -> dict[str, tuple[str, float]]:
        return {metadata.message_id: (client, when) for metadata, client, when in self._asked}
