"""Rounds whose clients add the noise: no sum is ever clean, and what is counted is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.clipped_sum import transmitted
from aggregation.errors import AggregationError
from aggregation.parcel import sent_keys
from aggregation.secret_reduction import SecureReduction
from aggregation.secure_pieces import ring_of
from aggregation.update import Update
from clients.node import insist
from clients.secure_desk import SecureDesk
from federation.rounds import RoundsConfig, RoundsError
from federation.secure_exchange import SecureExchange
from federation.server_app import run_training
from federation.strategy import TrainingResult
from privacy.budget import BudgetExceeded
from privacy.central import CentralPrivacy
from privacy.cohort_account import CohortAccount
from privacy.ledger import Ledger
from privacy.randomness import seeded_key
from privacy.secure_session import SecureSumError
from privacy.secure_sum import Ring as Numbers
from privacy.secure_sum import SecureServer
from protos import flower
from simulations.grid import LocalGrid
from tests.simulations.toy import START, honest, settings
from tests.simulations.toy_secure import Dies, secure_app, secure_settings

NAMES = [flower.client_name(number) for number in range(12)]
NOISE, CLIP = 2.0, 0.5
# Of twelve clients, 30 % of whom may drop out and 10 % be in league with the server.
LEAST, HONEST = 8, 6


def promised(**changes: object) -> CentralPrivacy:
    fields = {"rounds": 1, "clients": 12, "delta": 0.05, "noise_multiplier": NOISE, "clip": CLIP}
    return CentralPrivacy(mechanism="distributed", **{**fields, **changes})  # type: ignore[arg-type]


def dead(step: str, count: int) -> Dies:
    return lambda client, asked, part: asked == step and client in NAMES[:count]


class Seen:
    """What the server learns: every sum that it ever unmasks, and what was spent before it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.totals: list[tuple[Numbers, tuple[str, ...]]] = []
        self.spent: list[int] = []
        self.account: CohortAccount | None = None
        unmask = SecureServer.total

        def total(server: SecureServer, messages):  # type: ignore[no-untyped-def]
            assert self.account is not None
            self.spent.append(len(self.account.events()))
            found = unmask(server, messages)
            self.totals.append((found, server.survivors()))
            return found

        monkeypatch.setattr(SecureServer, "total", total)


def run(
    folder: Path,
    seen: Seen,
    *,
    of: CentralPrivacy | None = None,
    dies: Dies = lambda client, step, part: False,
    desk: SecureDesk | None = None,
    trained: dict[str, Update] | None = None,
    answers: dict[tuple[str, str, int], Mapping[str, bytes]] | None = None,
    number: int = 0,
    name: str = "toy",
    devices: bool = False,
) -> tuple[TrainingResult, list[int], RoundsConfig]:
    """A run; gives its result, the steps of every event that the ledger has, and its settings."""
    of = of or promised()
    config = secure_settings(
        folder, run=name, recipe="ffa-lora", client_privacy=of, rounds=of.rounds, seed=11 + number
    )
    roster = str(flower.client_roster(config.data_folder)) if devices else ""
    config = replace(config, data_folder="") if devices else config
    ledger = Ledger(folder / "server.sqlite")
    account = seen.account = CohortAccount(of, run=name, ledger=ledger, key=seeded_key(1))

    def behave(task: flower.TrainTask, client: str) -> Update:
        return replace(honest(task, client), weight=1.0)

    app = secure_app(behave, dies=dies, desk=desk, trained=trained, seen=answers, roster=roster)
    try:
        with LocalGrid(app, 12) as grid:
            result = run_training(grid, config, initial=START, account=account)
        return result, [event.steps for event in account.events()], config
    finally:
        ledger.close()


def clean_sum(config: RoundsConfig, trained: Mapping[str, Update], names: tuple[str, ...]):  # type: ignore[no-untyped-def]
    """The sum of clipped updates, which nobody but a test may know, in whole numbers; the ring."""
    chosen = config.chosen()
    ring = ring_of(chosen, 12)
    keys = sent_keys(START.spec, chosen.assignment(1, START.spec))
    total = np.zeros(sum(START.tensors[key].size for key in keys))
    for name in names:
        change = transmitted(trained[name].adapter, START, keys)
        change = change * min(1.0, CLIP / float(np.linalg.norm(change)))
        total += np.trunc(change / ring.lsb)
    return total, ring


@pytest.mark.parametrize(
    ("step", "count", "inside"),
    [("train", 2, 10), ("masked", 3, 9), ("reveal", 3, 12)],
)
def test_a_sum_is_never_clean_and_has_the_noise_of_those_in_it(
    step: str, count: int, inside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, trained, noises = Seen(monkeypatch), dict[str, Update](), []
    # Devices draw their noise anew each time; the numbers of both rounds are looked at together.
    for number in range(2):
        folder = tmp_path / str(number)
        (folder / "partitions").mkdir(parents=True)
        result, events, config = run(
            folder, seen, dies=dead(step, count), trained=trained, number=number
        )
        assert events == [1]
        (total, survivors) = seen.totals[-1]
        assert len(survivors) == inside == result.rounds[-1].secure["summed"]
        clean, ring = clean_sum(config, trained, survivors)
        noise = total.view(np.int32).astype(float) - clean
        assert float(np.abs(noise).min()) > inside  # not even one value is known but for rounding
        noises.append(noise)
        moved = result.adapter
        keys = sent_keys(START.spec, config.chosen().assignment(1, START.spec))
        change = np.concatenate([(moved.tensors[k] - START.tensors[k]).ravel() for k in keys])
        assert np.abs(change - (clean + noise) * ring.lsb / 12).max() < 1e-6
    assert seen.spent == [1, 1]  # counted before they were unmasked
    together = np.concatenate(noises)
    counted = NOISE * CLIP / ring.lsb
    expected = counted * math.sqrt(inside / HONEST)
    # The root mean square of n normal numbers is off by one part in sqrt(2 n).
    spread = 5 / math.sqrt(2 * together.size)
    assert abs(float(np.sqrt(np.mean(together**2))) / expected - 1) < spread
    assert expected > 1.2 * counted
    said = result.rounds[-1].secure
    assert (said["least"], said["honest"], said["share"]) == (LEAST, HONEST, ring.share)


@pytest.mark.parametrize("step", ["train", "keys", "masked"])
def test_with_fewer_than_are_counted_on_nothing_is_unmasked_or_spent(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, answers = Seen(monkeypatch), dict[tuple[str, str, int], Mapping[str, bytes]]()
    result, events, _ = run(tmp_path, seen, dies=dead(step, 5), answers=answers)
    assert "given up" in result.rounds[-1].unchanged
    assert result.adapter.digest == START.digest
    assert events == seen.totals == []
    assert "reveal" not in {step for _, step, _ in answers}


class Greedy(SecureExchange):
    """A server that would go on with too few: its ring asks for the noise of many."""

    def run(self) -> None:
        object.__setattr__(self.layout, "ring", replace(self.layout.ring, least=1, honest=1))
        super().run()


def test_clients_refuse_a_sum_with_too_little_noise_whatever_the_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.secure_exchange.SecureExchange", Greedy)
    answers: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    seen = Seen(monkeypatch)
    result, events, _ = run(tmp_path, seen, dies=dead("train", 5), answers=answers)
    assert answers == {}  # seven are no cohort of theirs: not even keys
    assert "given up" in result.rounds[-1].unchanged
    # Ten train, and three of them vanish before their vectors: seven signatures are not given.
    lost = {("train", name) for name in NAMES[:2]} | {("masked", name) for name in NAMES[2:5]}
    folder = tmp_path / "second"
    (folder / "partitions").mkdir(parents=True)
    result, events, _ = run(
        folder, seen, dies=lambda client, step, part: (step, client) in lost, answers=answers
    )
    assert {step for _, step, _ in answers} == {"keys", "pieces", "masked"}
    assert "given up" in result.rounds[-1].unchanged
    assert events == seen.totals == []


def test_a_round_that_devices_repeat_is_counted_again_and_has_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs over one ledger, as if the server had crashed after it had spent."""
    seen, results = Seen(monkeypatch), []
    (tmp_path / "partitions").mkdir()
    for count in (1, 2):
        result, events, _ = run(tmp_path, seen, desk=SecureDesk(once=True), devices=True)
        assert events == [1] * count
        results.append(result.adapter.digest)
    assert results[0] != results[1] != START.digest


def test_a_round_that_a_simulation_repeats_is_the_same_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    (tmp_path / "partitions").mkdir()
    (one, first, _), (two, again, _) = run(tmp_path, seen), run(tmp_path, seen)
    assert first == again == [1]
    assert one.adapter.digest == two.adapter.digest
    # With others in the sum it is another one.
    _, other, _ = run(tmp_path, seen, dies=dead("train", 1))
    assert other == [1, 1]


def test_a_round_that_would_overspend_is_refused_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, answers = Seen(monkeypatch), dict[tuple[str, str, int], Mapping[str, bytes]]()
    (tmp_path / "partitions").mkdir()
    of = promised(noise_multiplier=None, epsilon=3.0).calibrated()
    _, events, _ = run(tmp_path, seen, of=of)
    assert events == [1]
    with pytest.raises(BudgetExceeded, match=r"nobody was asked"):
        run(tmp_path, seen, of=of, answers=answers, name="another")
    assert answers == {}


def test_a_sum_is_paid_before_it_is_taken_and_no_update_is_added_alone(tmp_path: Path) -> None:
    config = secure_settings(tmp_path, recipe="ffa-lora", client_privacy=promised())
    ledger = Ledger(tmp_path / "server.sqlite")
    account = CohortAccount(promised(), run="toy", ledger=ledger, key=seeded_key(1))
    recipe = config.chosen()
    reduction = recipe.begin(recipe.start(START), noise=account)
    assert isinstance(reduction, SecureReduction)
    assert not reduction.in_any_case
    with pytest.raises(AggregationError, match="no sum"):
        reduction._sum.finish(1.0)
    with pytest.raises(AggregationError, match="own share"):
        reduction._sum.add(START, START, 1.0)
    with pytest.raises(AggregationError, match="pay first"):
        reduction._sum.add_sum(np.zeros(3), 1.0)  # type: ignore[union-attr]
    normals = account.pay(1, "ab")
    with pytest.raises(Exception, match="the server adds none"):
        normals("sum", 3)
    reduction.before_unmasking("cd")
    assert len(account.events()) == 2
    with pytest.raises(AggregationError, match="did not clip"):
        reduction._sum.add_sum(np.full(3, 2.0), 1.0)  # type: ignore[union-attr]
    ledger.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pieces": {"private": "none"}}, "choose private = 'secure-sum'"),
        ({"pieces": {"private": "secure-sum(dropouts=0.33, corrupt=0.33)"}}, "a larger cohort"),
        ({"recipe": "svd-warm-start"}, "choose reduce=factor-mean"),
        ({"pieces": {"private": "secure-sum", "weigh": "examples"}}, "choose weigh=uniform"),
    ],
)
def test_what_shares_do_not_go_with_is_refused_at_once(
    changes: dict[str, object], said: str
) -> None:
    fields = {"recipe": "ffa-lora", "clients": 4, "rounds": 1, **changes}
    fields = {"pieces": {"private": "secure-sum"}, **fields}
    with pytest.raises(RoundsError, match=said):
        settings(client_privacy=promised(clients=4), **fields)


def test_a_device_insists_on_noise(tmp_path: Path) -> None:
    config = secure_settings(tmp_path, recipe="ffa-lora", client_privacy=promised())
    ring = ring_of(config.chosen(), 12).to_mapping()
    insist({}, {})
    insist({"least-noise": "2.0", "roster-digest": "sha256:0"}, ring)
    with pytest.raises(SecureSumError, match="in the clear"):
        insist({"roster-digest": "sha256:0"}, {})
    for task in ({}, {**ring, "noise": 1.9}):
        with pytest.raises(SecureSumError, match="least-noise=2"):
            insist({"least-noise": 2.0}, task)
