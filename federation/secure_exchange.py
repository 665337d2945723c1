"""The secure sum of a round: five steps with the clients that have trained, over any grid.

The clients have said that they are ready and kept what they trained (``train`` with a ring); the
protocol is that of :mod:`privacy.secure_sum`, and whoever is missing in a step has dropped out of
it. A sketched mean takes two sums, of the same clients: if one of them is missing in the second,
the round is given up, since there is no part of the first sum that could be taken away.

Whatever goes wrong, the sum is given up and not put together from less: the round then leaves the
adapter as it was, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from aggregation.codec import CodecError
from aggregation.errors import AggregationError
from aggregation.recipe import Recipe
from aggregation.ring import Numbers
from aggregation.secret import Layout, unflat
from aggregation.secret_reduction import SecureReduction
from aggregation.secret_ring import Ring
from aggregation.state import GlobalState
from federation.intake import MALFORMED, WRONG_CLIENT, WRONG_ROUND, Intake
from federation.requests import Requests
from federation.rounds import LATE, RoundsConfig
from privacy.secure_messages import (
    KEY_BYTES,
    Confirmation,
    MaskedVector,
    PublicKeys,
    Revealed,
    SealedPieces,
)
from privacy.secure_session import SecureSumAborted, SecureSumError, Session
from privacy.secure_sum import SecureServer
from protos import flower

GIVEN_UP = "sum-given-up"
_OWN, _MASKING = "own/", "masking/"

_log = logging.getLogger("airpeft.federation.secure_exchange")


@dataclass
class SecureExchange:
    """One round's sums.

    Args:
        grid: carries the messages.
        taken: the round's replies so far: those who are ready.
        nodes: node of each client, by its name.
        config: of the run.
        layout: where in a vector what is.
        dropouts: share of the members that may drop out.
        corrupt: share of the members that may be in league with us.
        clock: seconds that only grow.
        bytes_down: bytes of the arrays that were sent.
        dropped: step and reason by client, for those who dropped out after they were ready.
    """

    grid: Grid
    taken: Intake
    nodes: Mapping[str, int]
    config: RoundsConfig
    layout: Layout
    dropouts: float
    corrupt: float
    clock: Callable[[], float]
    bytes_down: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Form the round's sums and give them to its reduction; or give the round up."""
        taken, reduction = self.taken, self.taken.reduction
        assert isinstance(reduction, SecureReduction)  # noqa: S101 - narrows the type
        try:
            total, members = self._sum(0, sorted(taken.used), self.layout.length)
            reduction.add_sum(self.layout.read(total, len(members)))
            if reduction.question():
                self._second(reduction, members)
            self.note |= {"summed": len(members), "bound": reduction.bound}
            self.note |= {"weight": reduction.weight}
        except (SecureSumError, AggregationError) as error:
            _log.warning("round %d: the secure sum is given up: %s", taken.expected.round, error)
            taken.given_up = f"the secure sum was given up: {error}"
            for client in list(taken.used):
                self._out(client, GIVEN_UP)
        self.note |= {"dropped": dict(sorted(self.dropped.items())), "given_up": taken.given_up}
        taken.secure = self.note

    def _second(self, reduction: SecureReduction, members: Sequence[str]) -> None:
        """Have what was trained projected, and add the projections up."""
        number = self.taken.expected.round
        task = flower.SketchTask(
            run=self.config.run,
            round=number,
            basis=reduction.question(),
            data_folder=self.config.data_folder,
            base=self.config.base,
            secure=True,
        )
        content = flower.sketch_task_record(task)
        ready = set()
        for client, reply in self._exchange(flower.SKETCH, dict.fromkeys(members, content)):
            reason = self._judge_ready(client, reply)
            if reason:
                self.dropped[client] = f"sketch: {reason}"
            else:
                ready.add(client)
        if len(ready) < len(members):
            raise SecureSumAborted(
                f"{len(members) - len(ready)} of the {len(members)} clients in the first sum did "
                "not answer it, and nothing can be taken out of a sum"
            )
        shapes = reduction.answer_shapes()
        length = sum(rows * columns for rows, columns in shapes.values())
        total, there = self._sum(1, members, length, everybody=True)
        sums = self.layout.ring.wide.sums(total, len(there))
        reduction.answer_sum(unflat(sums, shapes))

    def _judge_ready(self, client: str, reply: Message) -> str:
        if not reply.has_content():
            return flower.fault_of(reply)
        try:
            said = flower.ready_from(reply.content)
        except flower.RecordError:
            return MALFORMED
        if said.client != client:
            return WRONG_CLIENT
        return "" if said.round == self.taken.expected.round else WRONG_ROUND

    def _sum(
        self, part: int, members: Sequence[str], length: int, *, everybody: bool = False
    ) -> tuple[Numbers, tuple[str, ...]]:
        """The sum of the members' vectors, and whose vectors are in it.

        Raises:
            SecureSumError: if it cannot be formed without giving something away.
        """
        session = Session.of(
            self.config.run,
            self.taken.expected.round,
            members,
            length=length,
            dropouts=self.dropouts,
            corrupt=self.corrupt,
            part=part,
        )
        self.note |= {"members": len(members), "threshold": session.threshold}
        server = SecureServer(session)
        keys = server.keys(list(self._keys(part, session)))
        pieces = server.pieces(list(self._pieces(part, keys)))
        for masked in self._masked(part, pieces, length):
            server.add(masked)
        survivors = server.survivors()
        wanted = len(members) if everybody else self.config.min_updates
        if len(survivors) < wanted:  # before anything is unmasked
            raise SecureSumAborted(f"{len(survivors)} vectors came, {wanted} are needed")
        confirmed = server.confirmations(list(self._confirm(part, survivors)))
        return server.total(list(self._reveal(part, confirmed))), survivors

    def _keys(self, part: int, session: Session) -> Iterator[PublicKeys]:
        first = self._task(part, "keys", names=session.members)
        first = replace(first, dropouts=self.dropouts, corrupt=self.corrupt)
        for client, blobs in self._step(part, dict.fromkeys(session.members, first)):
            said = blobs.get("keys", b"")
            halves = (said[:KEY_BYTES], said[KEY_BYTES : 2 * KEY_BYTES])
            try:
                yield PublicKeys(client, *halves, said[2 * KEY_BYTES :])
            except SecureSumError:
                self._drop(client, "keys", MALFORMED)

    def _pieces(
        self, part: int, keys: Mapping[str, Sequence[PublicKeys]]
    ) -> Iterator[SealedPieces]:
        tasks = {
            client: self._task(
                part, "pieces", {k.member: k.sealing + k.masking + k.signature for k in theirs}
            )
            for client, theirs in keys.items()
        }
        for client, blobs in self._step(part, tasks):
            yield SealedPieces(client, blobs)

    def _masked(
        self, part: int, pieces: Mapping[str, Mapping[str, bytes]], length: int
    ) -> Iterator[MaskedVector]:
        tasks = {client: self._task(part, "masked", theirs) for client, theirs in pieces.items()}
        for client, blobs in self._step(part, tasks):
            try:
                yield MaskedVector(
                    client, self.layout.ring.from_bytes(blobs.get("vector", b""), length)
                )
            except CodecError:
                self._drop(client, "masked", MALFORMED)

    def _confirm(self, part: int, survivors: Sequence[str]) -> Iterator[Confirmation]:
        task = self._task(part, "confirm", names=survivors)
        for client, blobs in self._step(part, dict.fromkeys(survivors, task)):
            yield Confirmation(client, blobs.get("signature", b""))

    def _reveal(
        self, part: int, confirmed: Mapping[str, Sequence[Confirmation]]
    ) -> Iterator[Revealed]:
        tasks = {
            client: self._task(part, "reveal", {one.member: one.signature for one in theirs})
            for client, theirs in confirmed.items()
        }
        for client, blobs in self._step(part, tasks):
            own, masking = (
                {k.removeprefix(kind): b for k, b in blobs.items() if k.startswith(kind)}
                for kind in (_OWN, _MASKING)
            )
            yield Revealed(client, own, masking)

    def _task(
        self,
        part: int,
        step: str,
        blobs: Mapping[str, bytes] | None = None,
        names: Sequence[str] = (),
    ) -> flower.SecureTask:
        return flower.SecureTask(
            run=self.config.run,
            round=self.taken.expected.round,
            part=part,
            step=step,
            names=tuple(names),
            blobs=blobs or {},
            seed=self.config.seed,
            data_folder=self.config.data_folder,
            base=self.config.base,
        )

    def _step(
        self, part: int, tasks: Mapping[str, flower.SecureTask]
    ) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """What each member answers to a step; who does not answer soundly has dropped out."""
        step = next(iter(tasks.values())).step
        answered = set()
        made: dict[int, Any] = {}  # tasks that are one and the same are written once
        contents = {
            client: made.setdefault(id(task), flower.secure_task_record(task))
            for client, task in tasks.items()
        }
        for client, reply in self._exchange(flower.SECURE, contents):
            answered.add(client)
            reason, blobs = self._judge(part, step, client, reply)
            if reason:
                self._drop(client, step, reason)
            else:
                yield client, blobs
        for client in tasks:
            if client not in answered:
                self._drop(client, step, LATE)

    def _judge(
        self, part: int, step: str, client: str, reply: Message
    ) -> tuple[str, Mapping[str, bytes]]:
        if not reply.has_content():
            return flower.fault_of(reply), {}
        try:
            said = flower.secure_reply_from(reply.content)
        except flower.RecordError as error:
            _log.warning("%s sent a malformed answer to step %s: %s", client, step, error)
            return MALFORMED, {}
        if said.client != client:
            return WRONG_CLIENT, {}
        if (said.round, said.part, said.step) != (self.taken.expected.round, part, step):
            return WRONG_ROUND, {}
        return "", said.blobs

    def _exchange(self, kind: str, contents: Mapping[str, Any]) -> Iterator[tuple[str, Message]]:
        requests = Requests(self.clock)

        def messages() -> Iterator[Message]:
            for client, content in contents.items():
                self.bytes_down += flower.record_bytes(content)
                message = Message(content, dst_node_id=self.nodes[client], message_type=kind)
                yield requests.add(message, client)

        replies = self.grid.send_and_receive(messages(), timeout=self.config.deadline_seconds)
        for reply, client, _ in requests.match(replies):
            if reply.has_content():
                self.taken.nbytes += flower.record_bytes(reply.content)
            yield client, reply

    def _drop(self, client: str, step: str, reason: str) -> None:
        """A member has dropped out; before its vector is in, that leaves it out of the round."""
        self.dropped[client] = f"{step}: {reason}"
        if step in flower.STEPS[:3]:
            self._out(client, reason)

    def _out(self, client: str, reason: str) -> None:
        self.taken.used.pop(client, None)
        self.taken.refused.setdefault(client, reason)


def layout_of(recipe: Recipe, state: GlobalState, ring: Ring) -> Layout:
    """Where in a vector of the round after a state what is."""
    spec = state.adapter.spec
    return Layout(spec, recipe.assignment(state.round + 1, spec), ring)


def sum_up(
    grid: Grid,
    taken: Intake,
    nodes: Mapping[str, int],
    config: RoundsConfig,
    layout: Layout,
    clock: Callable[[], float],
) -> int:
    """Form the round's secure sums; arguments as for :class:`SecureExchange`.

    Returns:
        Bytes of the arrays that were sent.
    """
    private = config.chosen().private
    exchange = SecureExchange(
        grid, taken, nodes, config, layout, private.dropouts, private.corrupt, clock
    )
    exchange.run()
    return exchange.bytes_down
