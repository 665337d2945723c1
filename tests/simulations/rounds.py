"""Rounds of real clients on a tiny base, with every byte on the wire counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import Message

from clients.client_app import app as client_app
from clients.client_app import resident
from federation.server_app import run_training
from federation.strategy import Reply, TrainingResult
from protos import flower
from simulations import evaluation, folder
from simulations.folder import Run
from simulations.grid import LocalGrid
from simulations.scenario import Scenario


def array_bytes(message: Message) -> int:
    """Bytes of all arrays of a message, counted here and not by the code under test."""
    if not message.has_content():
        return 0
    arrays = message.content.array_records.values()
    return sum(len(array.data) for record in arrays for array in record.values())


class CountingGrid(LocalGrid):
    """A grid that adds up what it carries, by type of message and direction."""

    def __init__(self, clients: int) -> None:
        super().__init__(client_app, clients)
        self.carried: Counter[str] = Counter()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return super().push_messages(self._down(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self._up(super().pull_messages(message_ids)))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        yield from self._up(super().send_and_receive(self._down(messages), timeout=timeout))

    def _down(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self.carried[_group(message) + " down"] += array_bytes(message)
            yield message

    def _up(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            self.carried[_group(reply) + " up"] += array_bytes(reply)
            yield reply


def _group(message: Message) -> str:
    return "measuring" if message.metadata.message_type == flower.EVALUATE else "training"


def rounds_of(
    scenario: Scenario,
    out: Path,
    *,
    on_reply: Callable[[Reply], None] = lambda _: None,
    grid: CountingGrid | None = None,
) -> tuple[Run, TrainingResult, CountingGrid]:
    """The rounds of a scenario, without the report; goes on where an earlier call stopped."""
    with folder.locked(out) as where:
        run = folder.prepare(scenario, where)
        trainer = resident(run.scenario.base.name, run.ledger, False, 1)
        length = run.scenario.train.max_length
        measure = evaluation.by_class(trainer, run.heldout, max_length=length)
        with grid or CountingGrid(run.clients) as carrier:
            result = run_training(
                carrier,
                run.config,
                initial=run.initial,
                evaluate=measure,
                on_reply=on_reply,
                checkpoint=run.checkpoints,
            )
    return run, result, carrier
