"""The second round trip of a sketched mean: who sent a first sketch projects on its basis.

They are asked once, with the round's deadline, and must still have what they trained; see
:mod:`aggregation.sketching` for the algebra, and for why the result without those who do not answer
is the exact mean of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from aggregation.update import UpdateError
from federation.intake import MALFORMED, WRONG_CLIENT, WRONG_ROUND, Intake
from federation.requests import Requests
from federation.rounds import LATE, RoundsConfig
from protos import flower

_log = logging.getLogger("airpeft.federation.sketch_exchange")


def second_pass(
    grid: Grid,
    taken: Intake,
    nodes: Mapping[str, int],
    config: RoundsConfig,
    clock: Callable[[], float],
) -> int:
    """Ask for the second sketches, if the round's recipe needs any, and add them up.

    A client that does not answer, or not soundly, is no longer among ``taken.used``.

    Args:
        grid: carries the messages.
        taken: the round's replies so far.
        nodes: node of each client, by its name.
        config: of the run.
        clock: seconds that only grow.

    Returns:
        Bytes of the arrays that were sent.
    """
    basis = taken.reduction.question()
    if not basis:
        return 0
    number = taken.expected.round
    task = flower.SketchTask(
        run=config.run, round=number, basis=basis, data_folder=config.data_folder
    )
    content = flower.sketch_task_record(task)
    asked = [client for client in taken.reduction.waiting() if client in nodes]
    requests = Requests(clock)

    def messages() -> Iterator[Message]:
        for client in asked:
            message = Message(content, dst_node_id=nodes[client], message_type=flower.SKETCH)
            yield requests.add(message, client)

    replies = grid.send_and_receive(messages(), timeout=config.deadline_seconds)
    for reply, client, _ in requests.match(replies):
        reason = _judge(taken, reply, client)
        if reason:
            taken.refuse(client, reason)
    for client in taken.reduction.waiting():
        taken.used.pop(client, None)
        taken.refused.setdefault(client, LATE)
    return len(asked) * flower.record_bytes(content)


def _judge(taken: Intake, reply: Message, client: str) -> str:
    """Why a reply is refused; empty if it is in the sum now."""
    if not reply.has_content():
        return flower.fault_of(reply)
    taken.nbytes += flower.record_bytes(reply.content)
    try:
        said = flower.sketch_reply_from(reply.content)
    except flower.RecordError as error:
        _log.warning("%s sent a malformed sketch: %s", client, error)
        return MALFORMED
    if said.client != client:
        return WRONG_CLIENT
    if said.round != taken.expected.round:
        return WRONG_ROUND
    try:
        taken.reduction.answer(client, said.sketches)
    except UpdateError as error:
        _log.info("%s: %s", client, error)
        return error.reason.value
    return ""
