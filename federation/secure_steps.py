"""The five steps of a secure sum as messages: who is asked for what, and who has dropped out.

Each member is asked once for each step, which waits for at most a share of the round's deadline
(``step_share``) and then goes on with those who have answered, if they are enough. What a member
answers is judged on its own, and whoever does not answer soundly is out of the sum from there on,
and is not asked again: a member that hangs costs a round one step's wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from aggregation.codec import CodecError
from aggregation.secret import Layout
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
from privacy.secure_session import SecureSumError, Session
from protos import flower

_OWN, _MASKING = "own/", "masking/"

_log = logging.getLogger("airpeft.federation.secure_exchange")


@dataclass
class SecureSteps:
    """One round's sums, step by step.

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
        note: what is to be recorded.
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

        seconds = self.config.step_share * self.config.deadline_seconds
        replies = self.grid.send_and_receive(messages(), timeout=seconds)
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
