"""An in-process Flower grid: the same ServerApp, Strategy and ClientApp objects, no Ray, no server.

Flower's simulation starts Ray, which costs 20 seconds before the first message and 10 ms for each;
this costs a millisecond. Messages are copied through their wire format in both directions, so
nothing is shared that a network would not share.

Work is done on *lanes*. Each lane handles one message at a time, and a client always goes to the
lane of its partition number, so what a lane's resident trainer has cached is of use. Replies come
back one by one in the order of the requests, whatever the number of lanes: the sums that a
strategy forms are the same to the last bit. Only a few requests are under way at any time, so
memory does not grow with the number of clients.

A client that raises answers with an error, as in a deployment. A client that is not back by the
deadline is left behind: its lane is given up, another takes its place, and the round goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.errors import SimulationError
from simulations.lanes import InProcess, Lane, Worker

FIRST_NODE = 1 << 20
GRACE_SECONDS = 10.0
REQUESTS_PER_LANE = 3  # one at work, and enough behind it that it never waits

_log = logging.getLogger("airpeft.simulations.grid")


class GridError(SimulationError):
    """A message that this grid can't carry."""


@dataclass(frozen=True)
class _Pending:
    request: Message
    lane: int
    reply: Future[Message]


class LocalGrid(Grid):  # type: ignore[misc]  # flwr is untyped here
    """Carries messages to a ClientApp in this process.

    Args:
        client_app: Flower's ClientApp object, such as ``clients.client_app.app``.
        clients: number of clients; each has its ``partition-id`` in its ``node_config``.
        workers: one for each lane; none for one lane that trains in this process.
        node_config: further entries for every client's ``node_config``.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        *,
        workers: Iterable[Worker] = (),
        node_config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if clients < 1:
            raise GridError(f"clients={clients}: at least one is needed")
        # Flower keeps the identity of the running task in a class; its Message needs it.
        TaskIdentity.run_id, TaskIdentity.task_id = 1, 0
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._app = client_app
        self._clients = clients
        self._node_config = dict(node_config or {})
        self._clock = clock
        self._contexts: dict[int, Context] = {}
        self._lanes = [Lane(worker, self._handle) for worker in (list(workers) or [InProcess()])]
        self._pushed: dict[str, _Pending] = {}
        self._count = 0
        self._run = Run.create_empty(run_id=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the lanes end; workers belong to whoever made them.

        A client that trains in this very process is given a moment to finish: an interpreter
        that ends under a thread inside a matrix product may crash.
        """
        for lane in self._lanes:
            lane.close(GRACE_SECONDS if isinstance(lane.worker, InProcess) else 0.0)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message, as Flower's own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All clients are always there."""
        return range(FIRST_NODE, FIRST_NODE + self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start work on messages.

        Returns:
            their ids.
        """
        pushed = [self._submit(message) for message in messages]
        self._pushed.update({p.request.metadata.message_id: p for p in pushed})
        return [p.request.metadata.message_id for p in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now; each is handed out once."""
        ready = [i for i in message_ids if i in self._pushed and self._pushed[i].reply.done()]
        return [self._pushed.pop(i).reply.result() for i in ready]

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Give up on replies that are not there; what waited behind them is not lost.

        Args:
            message_ids: from :meth:`push_messages`.
        """
        for name in message_ids:
            pending = self._pushed.pop(name, None)
            if pending is None or pending.reply.done() or pending.reply.cancel():
                continue
            self._replace(pending.lane)
            for other, waiting in list(self._pushed.items()):
                if waiting.lane == pending.lane and waiting.reply.cancel():
                    again = self._lanes[waiting.lane].submit(_wire_copy(waiting.request))
                    self._pushed[other] = replace(waiting, reply=again)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and hand out the replies one by one, in the order of the messages.

        Args:
            messages: taken one at a time, never more than a few ahead of the replies.
            timeout: seconds for all of them together; replies that come later are dropped.
        """
        deadline = None if timeout is None else self._clock() + timeout
        window = REQUESTS_PER_LANE * len(self._lanes)
        pending: deque[_Pending] = deque()
        for message in messages:
            if self._left(deadline) == 0.0:
                break
            pending.append(self._submit(message))
            if len(pending) >= window:
                yield from self._receive(pending.popleft(), deadline)
        while pending:
            yield from self._receive(pending.popleft(), deadline)

    def _submit(self, message: Message) -> _Pending:
        partition = message.metadata.dst_node_id - FIRST_NODE
        if not 0 <= partition < self._clients:
            raise GridError(f"there is no node {message.metadata.dst_node_id}")
        self._count += 1
        message.metadata.__dict__["_message_id"] = f"message-{self._count}"
        lane = partition % len(self._lanes)
        return _Pending(message, lane, self._lanes[lane].submit(_wire_copy(message)))

    def _receive(self, pending: _Pending, deadline: float | None) -> Iterator[Message]:
        try:
            yield pending.reply.result(self._left(deadline))
        except TimeoutError:
            if not pending.reply.cancel():  # at work: whatever holds it must not hold the others
                self._replace(pending.lane)

    def _replace(self, number: int) -> None:
        lane = self._lanes[number]
        _log.warning("a client on lane %d is late; the lane is replaced", number)
        lane.worker.abandon()
        lane.close()
        self._lanes[number] = Lane(lane.worker, self._handle)

    def _left(self, deadline: float | None) -> float | None:
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _handle(self, request: Message, node_config: Mapping[str, str]) -> Message:
        """Run the ClientApp; an exception becomes an error reply, without its text."""
        partition = request.metadata.dst_node_id - FIRST_NODE
        try:
            reply = self._app(request, self._context(partition, node_config))
        except Exception as error:
            _log.warning("client %d raised %s", partition, type(error).__name__, exc_info=True)
            reply = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__),
                reply_to=request,
            )
        return _wire_copy(reply)

    def _context(self, partition: int, node_config: Mapping[str, str]) -> Context:
        if partition not in self._contexts:
            self._contexts[partition] = Context(
                run_id=1,
                node_id=FIRST_NODE + partition,
                node_config={},
                state=RecordDict(),
                run_config={},
            )
        context = self._contexts[partition]
        context.node_config = {
            "partition-id": partition,
            "num-partitions": self._clients,
            **self._node_config,
            **node_config,
        }
        return context


def _wire_copy(message: Message) -> Message:
    """The message as it would arrive over a network."""
    return message_from_proto(
        ProtoMessage.FromString(message_to_proto(message).SerializeToString())
    )
