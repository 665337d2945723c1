"""One round's replies: each judged by itself, used or refused with its reason.

A reply that is late, malformed, of another round or another client, or that the recipe refuses,
leaves nothing behind but its reason. One that lacks tensors which the server believed it had is
not refused yet: it is to be asked again, with everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.combining import Reduction
from aggregation.update import Update, UpdateError
from federation.rounds import LATE
from privacy.budget import BudgetError, LocalPrivacy
from privacy.calibration import told_event
from protos import flower

_log = logging.getLogger("airpeft.federation.intake")

MALFORMED, WRONG_CLIENT, WRONG_ROUND = "malformed", "wrong-client", "wrong-round"


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


@dataclass(frozen=True)
class Expected:
    """What the replies of a round must be.

    Attributes:
        round: number of the round.
        codec: how values travel.
        assignment: what a client was asked, by its name.
        start: an adapter that was handed out, by its digest.
        secure: whether clients keep their updates for a secure sum, and say that they are ready.
        privacy: what they were asked to keep to, and so have to say what they spent; None for
            training without privacy.
        small: the global adapter; it stands for what is summed up already, since only the small
            fields of a used update are kept.
    """

    round: int
    codec: str
    assignment: Callable[[str], Assignment]
    start: Callable[[str], Adapter | None]
    small: Adapter
    secure: bool = False
    privacy: LocalPrivacy | None = None


@dataclass
class Intake:
    """The replies of a round, as they come.

    Attributes:
        expected: what they must be.
        reduction: where updates are summed up.
        on_reply: called for each reply that is judged.
        used: the updates in the sum, by client, without their tensors.
        refused: why each other one is not in it, by client.
        spent: the privacy event that a client has told, used or refused: what it has sent was
            released to us in any case.
        lacking: clients that have lost what was left out of their tasks.
        nbytes: bytes of the arrays of all replies, of refused ones too.
        given_up: why the round's secure sum was given up; empty if it was not.
        secure: what is to be recorded of it.
    """

    expected: Expected
    reduction: Reduction
    on_reply: Callable[[Reply], None] = lambda _: None
    used: dict[str, Update] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    spent: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    nbytes: int = 0
    given_up: str = ""
    secure: Mapping[str, Any] = field(default_factory=dict)

    def take(self, replies: Iterable[tuple[Message, str, float]]) -> None:
        """Judge replies.

        Args:
            replies: each with its client and the seconds since that one was asked, as
                :meth:`federation.requests.Requests.match` gives them.
        """
        for reply, client, seconds in replies:
            outcome = self._judge(reply, client)
            if outcome == flower.ClientFault.MISSING_TENSORS and client not in self.lacking:
                self.lacking.append(client)
                continue
            if outcome:
                self.refuse(client, outcome)
            self.on_reply(Reply(self.expected.round, client, outcome, seconds))

    def note_spent(self, reply: Message, client: str) -> bool:
        """Remember what a reply says that its client has spent; whether it says so as it should."""
        event, asked = flower.event_from(reply.content), self.expected.privacy
        if not event:
            return asked is None
        try:
            self.spent[client] = told_event(event, asked).to_mapping()
        except BudgetError as error:
            _log.warning("round %d: %s: %s", self.expected.round, client, error)
            return False
        return True

    def refuse(self, client: str, reason: str) -> None:
        """Leave a client out; the log says so."""
        self.refused[client] = reason
        _log.warning("round %d: %s is left out: %s", self.expected.round, client, reason)

    def close(self, cohort: Iterable[str]) -> None:
        """Whoever of the cohort has not answered is late."""
        for client in cohort:
            if client not in self.used and client not in self.refused:
                self.refused[client] = LATE
        self.refused = dict(sorted(self.refused.items()))

    def _judge(self, reply: Message, client: str) -> str:
        """Why a reply is refused; empty if it is in the sum now."""
        if not reply.has_content():
            return flower.fault_of(reply)
        self.nbytes += flower.record_bytes(reply.content)
        want = self.expected
        if not self.note_spent(reply, client):
            return MALFORMED
        if want.secure:
            return self._judge_ready(reply, client)
        try:
            update = flower.update_from(
                reply.content, want.start, assignment=want.assignment(client), codec=want.codec
            )
        except flower.MissingStart:
            return "unknown-start"
        except flower.RecordError as error:
            _log.warning("round %d: %s sent a malformed reply: %s", want.round, client, error)
            return MALFORMED
        if update.client != client:
            return WRONG_CLIENT
        if update.round != want.round:
            return WRONG_ROUND
        try:
            self.reduction.add(update)
        except UpdateError as error:
            _log.info("round %d: %s", want.round, error)
            return error.reason.value
        self.used[client] = replace(update, adapter=want.small, parcel=None, sketches={})
        return ""

    def _judge_ready(self, reply: Message, client: str) -> str:
        """As :meth:`_judge`, where the update stays on the client."""
        want = self.expected
        try:
            ready = flower.ready_from(reply.content)
        except flower.RecordError as error:
            _log.warning("round %d: %s sent a malformed reply: %s", want.round, client, error)
            return MALFORMED
        if ready.client != client:
            return WRONG_CLIENT
        if ready.round != want.round:
            return WRONG_ROUND
        if want.start(ready.start) is None:
            return "unknown-start"
        self.used[client] = Update(
            client, want.round, ready.start, want.small, 0.0, ready.privacy_event, ready.metrics
        )
        return ""
