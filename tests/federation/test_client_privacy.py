"""Rounds with client-level privacy: counted first, once, and finished whoever came."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from aggregation.update import Update
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.server_app import run_training
from federation.strategy import TrainingResult
from privacy.budget import BudgetExceeded
from privacy.central import CentralPrivacy
from privacy.cohort_account import CohortAccount
from privacy.ledger import Ledger
from privacy.randomness import seeded_key
from protos import flower
from simulations.grid import LocalGrid
from tests.simulations.toy import START, Behaviour, honest, settings, toy_app


def private(**changes: object) -> RoundsConfig:
    """Three rounds of five clients, of which a coin draws each; or otherwise."""
    of_run = {"rounds": 3, "clients": 5, "fraction": 0.6, "sampling": "poisson"}
    promised = {"delta": 0.05, "noise_multiplier": 1.0}
    for name, value in changes.items():
        (of_run if name in {*of_run, "recipe", "pieces", "min_updates"} else promised)[name] = value
    central = CentralPrivacy(
        **{k: v for k, v in of_run.items() if k in CentralPrivacy.__dataclass_fields__},  # type: ignore[arg-type]
        **promised,  # type: ignore[arg-type]
    )
    return settings(**{"recipe": "ffa-lora", **of_run}, client_privacy=central)


@contextmanager
def keeping(config: RoundsConfig, folder: Path) -> Iterator[CohortAccount]:
    assert config.client_privacy is not None
    ledger = Ledger(folder / "server.sqlite")
    key = seeded_key(config.seed)
    try:
        yield CohortAccount(config.client_privacy, run=config.run, ledger=ledger, key=key)
    finally:
        ledger.close()


def run(
    config: RoundsConfig,
    folder: Path,
    behave: Behaviour = honest,
    on_round: Callable[[Round], None] = lambda _: None,
) -> TrainingResult:
    with (
        keeping(config, folder) as account,
        LocalGrid(toy_app(behave), config.clients) as grid,
    ):
        return run_training(
            grid,
            config,
            initial=START,
            on_round=on_round,
            checkpoint=folder / "checkpoints",
            account=account,
        )


def spent(config: RoundsConfig, folder: Path) -> list[int]:
    with keeping(config, folder) as account:
        return [event.steps for event in account.events()]


def test_every_round_is_counted_as_it_was_done(tmp_path: Path) -> None:
    config = private()
    result = run(config, tmp_path)
    assert spent(config, tmp_path) == [1, 1, 1]
    for record in result.rounds[1:]:
        (event,) = record.client_events
        assert (event["kind"], event["sample_rate"]) == ("gaussian-cohort", 0.6)
        assert record.adapter_out != record.adapter_in
        assert (record.aggregation_error, record.unchanged) == (0.0, "")
    assert Round.from_document(record.to_document()) == record
    old = {k: v for k, v in record.to_document().items() if k != "client_events"}
    assert Round.from_document(old).client_events == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "fedsvd"},
        {"recipe": "rolora"},
        {"pieces": {"optimise": "fedyogi"}},
        {"pieces": {"codec": "int8(error_feedback=true)"}},
    ],
    ids=str,
)
def test_what_comes_before_the_clip_and_after_the_noise_costs_nothing(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    """An SVD, a basis, an optimiser, a codec: the account is the same to the last event."""
    plain, other = private(rounds=2), private(rounds=2, **changes)
    told = [[r.client_events for r in run(c, tmp_path / c.recipe / str(c.pieces)[:9]).rounds]
            for c in (plain, other)]  # fmt: skip
    assert told[0] == told[1]
    assert plain.client_privacy == other.client_privacy


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_dies_spends_once_and_ends_as_it_would_have(
    tmp_path: Path, after: int, mechanism: str
) -> None:
    sampling = {"gaussian": "poisson", "tree": "fixed"}[mechanism]
    config = private(mechanism=mechanism, sampling=sampling)
    whole = run(config, tmp_path / "whole")

    def die(record: Round) -> None:
        if record.number == after:
            raise StopHereError

    with pytest.raises(StopHereError):
        run(config, tmp_path / "again", on_round=die)
    result = run(config, tmp_path / "again")
    assert result.adapter.digest == whole.adapter.digest
    assert spent(config, tmp_path / "again") == spent(config, tmp_path / "whole")


def test_a_round_that_was_paid_and_not_kept_is_not_paid_again(tmp_path: Path) -> None:
    """Killed between the ledger and the checkpoint, the window that there is."""
    config = private(rounds=2)
    whole = run(config, tmp_path)
    last = tmp_path / "checkpoints" / "round-00002"
    shutil.rmtree(last)
    assert spent(config, tmp_path) == [1, 1]
    assert run(config, tmp_path).adapter.digest == whole.adapter.digest
    assert spent(config, tmp_path) == [1, 1]

    # With other updates the same round is another release: fresh noise, and counted.
    def otherwise(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        return honest(replace(task, seed=task.seed + 1), client)

    shutil.rmtree(last)
    other = run(config, tmp_path, otherwise)
    assert len(other.rounds[-1].cohort) >= 2
    assert spent(config, tmp_path) == [1, 1, 1]
    assert len(other.rounds[-1].client_events) == 2
    apart = other.adapter.pack() - whole.adapter.pack()
    # Two independent noises over an expected cohort of 3, and not only what clients changed.
    assert np.std(apart[apart != 0]) > 0.8 * 2**0.5 / 3


def test_a_round_that_nobody_answers_is_a_round(tmp_path: Path) -> None:
    config = private(rounds=2)
    result = run(config, tmp_path, lambda task, client: flower.ClientFault.NO_DATA)
    for record in result.rounds[1:]:
        assert record.used == ()
        assert record.adapter_out != record.adapter_in
    assert spent(config, tmp_path) == [1, 1]
    noise = result.adapter.pack() - START.pack()
    sent = [key for key, value in result.adapter if np.any(value != START.tensors[key])]
    assert all("lora_A" not in key for key in sent)
    # Two rounds of noise 1 over an expected cohort of 3.
    moved = noise[noise != 0]
    assert np.std(moved) == pytest.approx(2**0.5 / 3, rel=0.3)


def test_the_cohorts_cannot_be_told_from_what_clients_are_told(tmp_path: Path) -> None:
    config = private(rounds=6)
    cohorts = [r.cohort for r in run(config, tmp_path / "a").rounds[1:]]
    open_config = settings(recipe="ffa-lora", rounds=6, fraction=0.6, sampling="poisson")
    with LocalGrid(toy_app(), 5) as grid:
        open_cohorts = [r.cohort for r in run_training(grid, open_config, initial=START).rounds[1:]]
    assert cohorts != open_cohorts
    again = replace(config, run="toy", deadline_seconds=601.0)
    assert [r.cohort for r in run(again, tmp_path / "b").rounds[1:]] == cohorts


def test_a_tree_asks_nobody_more_often_than_it_counts(tmp_path: Path) -> None:
    config = private(
        sampling="fixed",
        mechanism="tree",
        fraction=0.2,
        rounds=9,
        separation=4,
        participations=2,
        restart=8,
    )

    def die(record: Round) -> None:
        if record.number == 3:
            raise StopHereError

    with pytest.raises(StopHereError):
        run(config, tmp_path, on_round=die)
    result = run(config, tmp_path)  # who took part before the interruption still counts
    rounds: dict[str, list[int]] = {}
    for record in result.rounds[1:]:
        assert len(record.cohort) == 1
        rounds.setdefault(record.cohort[0], []).append(record.number)
    for numbers in rounds.values():
        assert all(later - earlier >= 4 for earlier, later in pairwise(numbers))
        assert max(Counter(number <= 8 for number in numbers).values()) <= 2
    assert spent(config, tmp_path) == [1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_round_that_would_overspend_is_not_asked_for(tmp_path: Path) -> None:
    config = private(epsilon=8.0, noise_multiplier=None)
    asked: list[int] = []

    def watched(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        asked.append(task.round)
        return honest(task, client)

    assert config.client_privacy is not None
    with keeping(replace(config, run="earlier"), tmp_path) as account:
        account.pay(1, "aa")  # an earlier run has spent on the same clients
    with pytest.raises(BudgetExceeded, match=r"round 3 of run toy .* nobody was asked"):
        run(config, tmp_path, watched)
    assert set(asked) <= {1, 2}
    assert spent(config, tmp_path) == [1, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_updates": 2}, "leave min_updates out"),
        ({"recipe": "svd-warm-start"}, "choose reduce=factor-mean"),
        ({"recipe": "dp-fedlora"}, "has private=factor-noise of its own"),
        ({"pieces": {"weigh": "examples"}}, "choose weigh=uniform"),
        ({"pieces": {"private": "client-dp", "weigh": "uniform"}}, "chooses that piece itself"),
    ],
)
def test_what_cannot_keep_the_promise_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(RoundsError, match=says):
        private(**changes)


def test_noise_without_an_account_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RoundsError, match=r"\[client_privacy\]"):
        settings(recipe="ffa-lora", pieces={"private": "client-dp", "weigh": "uniform"})
    config = private()
    with pytest.raises(RoundsError, match="counts rounds=3"):
        replace(config, rounds=4)
    with LocalGrid(toy_app(), 5) as grid:
        with pytest.raises(RoundsError, match="nobody keeps"):
            run_training(grid, config, initial=START)
        with (
            keeping(private(noise_multiplier=2.0), tmp_path) as account,
            pytest.raises(RoundsError, match="another promise"),
        ):
            run_training(grid, config, initial=START, account=account)


def test_a_secure_sum_earns_nothing_by_sampling() -> None:
    """Its members are told who the others are, so who was drawn is no secret to them."""
    pieces = {"private": "secure-sum"}
    with pytest.raises(RoundsError, match="sampling = 'fixed'"):
        private(pieces=pieces)
    fixed = private(pieces=pieces, sampling="fixed")
    assert fixed.chosen().private.kind == "secure-client-dp"
