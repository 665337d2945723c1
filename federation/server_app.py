"""A whole training run over a grid: the function that every ServerApp of ours calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.serverapp import Grid

from aggregation.adapter import Adapter
from federation.buffered import BufferedStrategy
from federation.checkpoint import Checkpoints
from federation.private_rounds import PrivateStrategy
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.strategy import Evaluate, LoraStrategy, Reply, TrainingResult
from privacy.cohort_account import CohortAccount

_log = logging.getLogger("airpeft.federation.server_app")


def run_training(
    grid: Grid,
    config: RoundsConfig,
    *,
    initial: Adapter,
    evaluate: Evaluate | None = None,
    on_round: Callable[[Round], None] = lambda _: None,
    on_begin: Callable[[int, tuple[str, ...]], None] = lambda _, __: None,
    on_reply: Callable[[Reply], None] = lambda _: None,
    checkpoint: Path | None = None,
    account: CohortAccount | None = None,
) -> TrainingResult:
    """Train for ``config.rounds`` rounds, or for those that are left of an interrupted run.

    A recipe that takes late updates (``fedbuff``) has no rounds but versions, see
    :mod:`federation.buffered`.

    Args:
        grid: carries the messages; any of Flower's, or ``simulations.grid.LocalGrid``.
        config: how the run goes.
        initial: the adapter to start from; not used by a run that goes on.
        evaluate: measures an adapter on held-out examples; called before the first round and
            after each one.
        on_round: called after a round is durable; not for the rounds of an earlier process.
        on_begin: called with the round's number and cohort before anybody is asked.
        on_reply: called for each client's reply.
        checkpoint: folder for the state after each round; None for a run that can't be resumed.
        account: keeps what ``config.client_privacy`` promises; needed if it promises anything.

    Returns:
        the last adapter and the records of all rounds, those of earlier processes included.

    Raises:
        CohortError: if no client connects in time.
        CheckpointError: if the folder holds another run.
        StorageError: if the disk is full; free some space and start the same run again.
        RoundsError: if an account is missing, or keeps another promise.
        BudgetExceeded: before the round that would overspend; the rounds before it are durable.
    """
    chosen = config.chosen()
    if chosen.warning:
        _log.warning("recipe %s: %s", chosen.name, chosen.warning)
    late = chosen.weigh.max_staleness is not None
    if config.client_privacy is not None and account is None:
        raise RoundsError(
            "client_privacy promises something that nobody keeps: give account=, a "
            "privacy.cohort_account.CohortAccount with the server's ledger and secret"
        )
    kind: Callable[..., LoraStrategy] = BufferedStrategy if late else LoraStrategy
    if account is not None:
        kind = partial(PrivateStrategy, account=account)
    strategy = kind(
        config,
        initial,
        evaluate=evaluate,
        on_round=on_round,
        on_begin=on_begin,
        on_reply=on_reply,
        checkpoints=Checkpoints(checkpoint, config.run) if checkpoint else None,
    )
    return strategy.start(grid)
