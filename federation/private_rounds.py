"""Rounds with client-level privacy: who may be asked, what it costs, and that it is counted first.

Over :class:`federation.strategy.LoraStrategy` it adds four things. A round that would overspend is
refused before anybody is asked. The cohort is drawn with a seed that only the server knows, and,
where what is promised limits how often a client takes part, from those who may. The sum gets its
noise from the account, which records what it costs first. And a round is finished whoever came:
that nobody did is told to nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from aggregation.adapter import Adapter
from aggregation.combining import Reduction
from federation import cohort
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.strategy import LoraStrategy
from privacy.cohort_account import CohortAccount


class PrivateStrategy(LoraStrategy):
    """Rounds whose sums are noised.

    Args:
        config: how the run goes; it says what is promised.
        initial: the adapter to start from.
        account: where noise comes from, and where it is counted.
        keywords: as for :class:`federation.strategy.LoraStrategy`.

    Raises:
        RoundsError: if the account keeps another promise than the settings make.
    """

    def __init__(
        self, config: RoundsConfig, initial: Adapter, *, account: CohortAccount, **keywords: Any
    ) -> None:
        if config.client_privacy is None or account.central != config.client_privacy.calibrated():
            raise RoundsError(
                "the account keeps another promise than the run's client_privacy: open it with "
                "the same settings"
            )
        super().__init__(config, initial, **keywords)
        self._account = account
        self._asked: dict[str, list[int]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As in any round, if it does not overspend.

        Raises:
            BudgetExceeded: before anybody is asked.
        """
        self._account.check(server_round)
        return super().configure_train(server_round, arrays, config, grid)

    def _draw(self, number: int) -> tuple[str, ...]:
        cfg = self._config
        able = self._able(number)
        wanted = math.ceil(cfg.fraction * len(self._nodes) - 1e-9)
        if cfg.sampling == "poisson":
            fraction = cfg.fraction  # a coin for each, whatever the others' say
        else:
            fraction = min(1.0, wanted / max(1, len(able)))
        return cohort.draw(able, number, fraction, cfg.sampling, self._account.sampling_seed)

    def _able(self, number: int) -> list[str]:
        """The clients that are there and may take part in a round."""
        central = self._account.central
        if central.mechanism != "tree":
            return list(self._nodes)
        first = self._account.tree_start(number)

        def may(client: str) -> bool:
            asked = self._asked.get(client, [])
            rested = all(number - when >= central.separation for when in asked)
            return rested and sum(when >= first for when in asked) < central.most_participations

        return [client for client in self._nodes if may(client)]

    def _reduction(self) -> Reduction:
        return self._recipe.begin(self._state, noise=self._account)

    def _close_round(self) -> None:
        super()._close_round()
        events = self._account.events(self._round.number)
        told = tuple(event.to_mapping() for event in events)
        self._round = replace(self._round, client_events=told)

    def _resume(self) -> list[Round]:
        history = super()._resume()
        for record in history:
            self._note(record)
        return history

    def _finish(self, record: Round, history: list[Round]) -> None:
        super()._finish(record, history)
        self._note(record)

    def _note(self, record: Round) -> None:
        """Whoever was asked has taken part, with an answer or without."""
        for client in record.cohort:
            self._asked.setdefault(client, []).append(record.number)
