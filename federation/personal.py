"""What clients measure themselves, where no global model tells: each on rows that never train.

After a round, the clients whose updates are in it get the new adapter, put what they keep of their
own to it, and measure. They are asked once; who does not answer is not in the mean.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from federation.handing_out import HandingOut
from federation.requests import Requests
from protos import flower

ACCURACY, LOSS, EXAMPLES = "personal_accuracy", "personal_loss", "personal_examples"

_log = logging.getLogger("airpeft.federation.personal")


@dataclass(frozen=True)
class Measured:
    """What the clients of a round have measured.

    Attributes:
        clients: by client: ``accuracy`` (0 to 1), ``loss`` (nats) and ``examples``.
        bytes_down: bytes of the arrays that asking took.
    """

    clients: Mapping[str, Mapping[str, float]]
    bytes_down: int

    def mean(self) -> dict[str, float]:
        """Accuracy and loss over all clients' rows together, and how many rows they are."""
        rows = sum(found["examples"] for found in self.clients.values())
        if not rows:
            return {}
        said = {EXAMPLES: rows}
        for name, key in (("accuracy", ACCURACY), ("loss", LOSS)):
            total = sum(found[name] * found["examples"] for found in self.clients.values())
            said[key] = total / rows
        return said


def measure(
    grid: Grid,
    targets: Iterable[tuple[int, str]],
    handing: HandingOut,
    *,
    round: int,  # noqa: A002 - the word of all messages
    timeout: float,
    clock: Callable[[], float],
) -> Measured:
    """Ask clients to measure what is handed out now, each with its own parts.

    Args:
        grid: carries the messages.
        targets: node and name of each client.
        handing: makes the tasks.
        round: number of the round that made what is measured.
        timeout: seconds for all of them together.
        clock: seconds that only grow.
    """
    requests = Requests(clock)
    sent = 0

    def messages() -> Iterator[Message]:
        nonlocal sent
        for node, client in targets:
            task = handing.evaluate(client)
            sent += task.nbytes
            message = Message(task.content, dst_node_id=node, message_type=flower.EVALUATE)
            yield requests.add(message, client)

    found = {}
    for reply, client, _ in requests.match(grid.send_and_receive(messages(), timeout=timeout)):
        try:
            if not reply.has_content():
                raise flower.RecordError(flower.fault_of(reply))
            said = flower.evaluate_result_from(reply.content)
            if (said.client, said.round) != (client, round):
                raise flower.RecordError("it answers another question")
        except flower.RecordError as error:
            _log.warning("round %d: %s measured nothing: %s", round, client, error)
            continue
        found[client] = {
            "accuracy": said.accuracy,
            "loss": said.loss,
            "examples": float(said.examples),
        }
    return Measured(dict(sorted(found.items())), sent)
