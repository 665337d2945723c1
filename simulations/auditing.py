"""What an audit asks, and the training of one client as what it asks.

    question = Question(claimed=4.0, delta=1e-5)
    own_training(base, rows, privacy, event).audit(question)       # -> privacy.audit.Audit

A local audit is one client's training by ``clients.loop``, as in a federation of one: each round
starts from what the last one ended with. It leaves no adapter, and spends nothing in any ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.init import initial_adapter
from aggregation.rank_selection import random_ranks
from clients.attachments import Attachment, attached
from clients.data import Examples
from clients.loop import LocalRound
from clients.model import BaseRef, adapter_spec
from clients.shelf import Shelf
from clients.training import TrainingPlan
from clients.trunk import CACHE_BYTES
from privacy.audit import CONFIDENCE, Audit, canaries_for, check_claim, judge
from privacy.audit_canaries import Canaries
from privacy.audit_local import GradientCanaries
from privacy.budget import LocalPrivacy
from privacy.events import SgdEvent
from privacy.randomness import derive, seeded_key

RANK, ALPHA = 8, 16.0  # as in a scenario that says nothing

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is promised, and how hard to look.

    Attributes:
        claimed: the epsilon that is promised for the whole run.
        delta: at which.
        canaries: how many; None for as many as it takes to refute the claim, if there is room.
        confidence: of the lower bound.
        seed: root of all randomness of the audit.

    Raises:
        AuditError: if nothing is promised, or a value is out of its bounds.
    """

    claimed: float
    delta: float
    canaries: int | None = None
    confidence: float = CONFIDENCE
    seed: int = 0

    def __post_init__(self) -> None:
        check_claim(self.claimed, self.delta, self.confidence)

    def plant(self, event: SgdEvent, room: int, progress: Progress) -> Canaries:
        """The canaries for a mechanism with so many parameters that train."""
        count = self.canaries
        if count is None:
            count = canaries_for(self.claimed, self.delta, self.confidence, most=room)
        return Canaries(count, event, derive(seeded_key(self.seed), "audit"), progress=progress)

    def answer(self, canaries: Canaries, mechanism: str) -> Audit:
        """What the canaries say after the mechanism has run."""
        return judge(
            canaries,
            claimed=self.claimed,
            delta=self.delta,
            mechanism=mechanism,
            confidence=self.confidence,
        )


class Subject(Protocol):
    """What can be audited."""

    @property
    def event(self) -> SgdEvent:
        """The whole run, as it is claimed to be."""

    @property
    def parameters(self) -> int:
        """Numbers in what is released."""

    @property
    def words(self) -> str:
        """What it is, for people."""

    def audit(self, question: Question, progress: Progress = lambda _: None) -> Audit:
        """Run the mechanism once, with canaries, and judge it.

        Args:
            question: what is claimed.
            progress: told after every step how many there were.

        Raises:
            AuditError: if there are more canaries than parameters, or the training diverges.
            MechanismError: if the model cannot be trained privately.
        """


@dataclass(frozen=True, kw_only=True)
class LocalSubject:
    """One client's private training.

    Attributes:
        base: the base model.
        start: the adapter that training starts from.
        examples: the client's rows.
        plan: how it trains.
        privacy: DP-SGD settings.
        round: what one round does.
        rounds: how many.
        client: its name.
        assignment: by number of the round, from 1: what trains.
    """

    base: BaseRef
    start: Adapter
    examples: Examples
    plan: TrainingPlan
    privacy: LocalPrivacy
    round: SgdEvent
    rounds: int = 1
    client: str = "one client"
    assignment: Callable[[int], Assignment] = lambda _: Assignment()

    @property
    def event(self) -> SgdEvent:
        """All rounds."""
        return replace(self.round, steps=self.round.steps * self.rounds)

    @property
    def parameters(self) -> int:
        """Numbers in the adapter."""
        return self.start.spec.size

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"DP-SGD of {self.client} on {self.base.name}, {len(self.examples):,} rows"

    def audit(self, question: Question, progress: Progress = lambda _: None) -> Audit:
        """Train once with canaries among the rows; see :class:`Subject`."""
        shelf = Shelf(self.base, CACHE_BYTES)
        peft_model = shelf.model(self.start.spec)
        features = shelf.features(peft_model, self.examples, self.plan.max_length)
        labels = torch.tensor(self.examples.labels)
        rooms = []
        for number in range(1, min(2, self.rounds) + 1):  # recipes alternate between two at most
            with self._attached(peft_model, self.start, number) as attachment:
                rooms.append(_room(attachment))
        planted = GradientCanaries(question.plant(self.event, min(rooms), progress))
        adapter, key = self.start, seeded_key(question.seed)
        for number in range(1, self.rounds + 1):
            with self._attached(peft_model, adapter, number) as attachment:
                own = derive(key, self.client, number)
                run = LocalRound(peft_model, attachment, self.plan, features, labels, own)
                run.privately(self.privacy, self.round, planted)
                adapter = attachment.read()
        return question.answer(planted.canaries, "local")

    def _attached(
        self, peft_model: Any, adapter: Adapter, number: int
    ) -> AbstractContextManager[Attachment]:
        asked, chosen = self.assignment(number), None
        if asked.select == "random":
            chosen = random_ranks(adapter.spec, asked.share, asked.seed, self.client, number)
        return attached(peft_model, adapter, asked, chosen=chosen)


def own_training(
    base: BaseRef,
    examples: Examples,
    privacy: LocalPrivacy,
    event: SgdEvent,
    *,
    rounds: int = 1,
    seed: int = 0,
) -> LocalSubject:
    """The default adapter of a base, trained on rows by the default plan.

    Args:
        base: the base model.
        examples: the rows.
        privacy: delta and clip; the noise is the event's.
        event: one round.
        rounds: how many.
        seed: of the adapter's start.

    Raises:
        BaseUnsupported: if the base has no such adapter.
    """
    spec = adapter_spec(base, examples.label_names, RANK, ALPHA)
    return LocalSubject(
        base=base,
        start=initial_adapter(spec, seed),
        examples=examples,
        plan=TrainingPlan(sample_rate=event.sample_rate, steps=event.steps),
        privacy=privacy,
        round=event,
        rounds=rounds,
    )


def _room(attachment: Attachment) -> int:
    """How many numbers train."""
    free = 0
    for name, parameter in attachment.parameters.items():
        mask = attachment.masks.get(name)
        free += parameter.numel() if mask is None else int(mask.expand(parameter.shape).sum())
    return free
