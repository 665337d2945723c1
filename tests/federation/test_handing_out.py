"""What each client of a round is sent, and what the server believes that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter
from aggregation.low_rank import LowRank
from aggregation.update import Update
from federation.result import TrainingResult
from federation.rounds import TOO_SMALL, Round, RoundsConfig, RoundsError
from federation.server_app import run_training
from protos import flower
from simulations.grid import LocalGrid
from tests.simulations.toy import SPEC, START, Behaviour, honest, settings, toy_app

HALF = 4 * sum(m.rank * m.d_out for m in SPEC.modules)  # bytes of all B
WHOLE = START.nbytes
HEAD = 4 * 20


def run(config: RoundsConfig, app: ClientApp | None = None) -> TrainingResult:
    with LocalGrid(app or toy_app(), config.clients) as grid:
        return run_training(grid, config, initial=START)


def frozen_a(task: flower.TrainTask, client: str) -> Update:
    """Moves B and the head, as only-b asks."""
    update = honest(task, client)
    kept = {m.keys[0]: task.adapter.tensors[m.keys[0]] for m in SPEC.modules}
    return replace(update, adapter=Adapter(SPEC, {**update.adapter.tensors, **kept}))


def names(count: int) -> tuple[str, ...]:
    return tuple(flower.client_name(i) for i in range(count))


def test_what_a_client_has_is_not_sent_again() -> None:
    result = run(settings(recipe="ffa-lora"), toy_app(frozen_a))
    first, second, third = result.rounds[1:]
    assert first.bytes_down == 5 * WHOLE
    assert second.bytes_down == third.bytes_down == 5 * (HALF + HEAD)
    assert {r.bytes_up for r in result.rounds[1:]} == {5 * (HALF + HEAD)}


def test_a_client_that_was_not_asked_gets_everything_that_has_changed_since_it_was() -> None:
    config = settings(recipe="ffa-lora", fraction=0.4, rounds=6)
    result = run(config, toy_app(frozen_a))
    seen: set[str] = set()
    for record in result.rounds[1:]:
        new = [client for client in record.cohort if client not in seen]
        old = len(record.cohort) - len(new)
        assert record.bytes_down == len(new) * WHOLE + old * (HALF + HEAD)
        seen |= set(record.cohort)
    assert len(seen) > 2


def test_clients_that_have_lost_it_are_asked_again_in_the_same_round() -> None:
    config = settings(recipe="ffa-lora")
    remembering = run(config, toy_app(frozen_a))
    forgetful = run(config, toy_app(frozen_a, forgetful=True))
    assert forgetful.adapter.digest == remembering.adapter.digest
    for record in forgetful.rounds[1:]:
        assert record.used == names(5)
        assert record.refused == {}
    # Both messages were sent, so both are counted.
    twice = 5 * (HALF + HEAD) + 5 * WHOLE
    assert [r.bytes_down for r in forgetful.rounds[1:]] == [5 * WHOLE, twice, twice]


def test_a_client_whose_update_was_not_used_is_not_believed_to_have_anything() -> None:
    def flaky(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        if client == "client-00002" and task.round == 1:
            return flower.ClientFault.TRAINING_FAILED
        return frozen_a(task, client)

    _, second, third = run(settings(recipe="ffa-lora"), toy_app(flaky)).rounds[1:]
    assert second.bytes_down == 4 * (HALF + HEAD) + WHOLE
    assert third.bytes_down == 5 * (HALF + HEAD)


def test_a_round_that_changed_nothing_sends_nothing() -> None:
    def failing(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        if task.round == 2 and client != "client-00000":
            return flower.ClientFault.TRAINING_FAILED
        return honest(task, client)

    result = run(settings(min_updates=2), toy_app(failing))
    assert result.rounds[2].unchanged == "1 usable updates, 2 are needed"
    # One has trained on it already, the others have it since the round before the last.
    assert result.rounds[3].bytes_down == 4 * WHOLE


RANKS = {"client-00000": 1, "client-00003": 1}


def test_clients_of_another_rank_get_an_adapter_of_theirs() -> None:
    got: dict[str, Adapter] = {}

    def watched(task: flower.TrainTask, client: str) -> Update:
        got[client] = task.adapter
        return honest(task, client)

    result = run(settings(ranks=RANKS, rounds=1), toy_app(watched))
    assert result.rounds[1].refused == {}
    for client, adapter in got.items():
        rank = RANKS.get(client, 2)
        assert [m.rank for m in adapter.spec.modules] == [rank, rank]
        for module in SPEC.modules:
            best, _ = LowRank.of(START, module.name).truncate(rank)
            mine = LowRank.of(adapter, module.name)
            assert np.allclose(mine.B @ mine.A, best.B @ best.A, atol=1e-5)
    assert result.rounds[1].bytes_down == sum(adapter.nbytes for adapter in got.values())
    assert [m.rank for m in result.adapter.spec.modules] == [2, 2]


def test_a_device_that_cannot_train_the_global_rank_gets_a_smaller_one_or_is_not_asked() -> None:
    small: Mapping[str, int] = {"client-00001": 1}
    asked: list[tuple[str, int]] = []

    def watched(task: flower.TrainTask, client: str) -> Update:
        asked.append((client, task.adapter.spec.modules[0].rank))
        return honest(task, client)

    mixed = run(settings(rounds=1), toy_app(watched, max_rank=small))
    assert dict(asked) == {name: (1 if name in small else 2) for name in names(5)}
    assert mixed.rounds[1].refused == {}
    asked.clear()
    same = run(settings(rounds=1, recipe="fedit"), toy_app(watched, max_rank=small))
    assert "client-00001" not in dict(asked)
    assert same.rounds[1].refused == {"client-00001": TOO_SMALL}
    assert same.rounds[1].cohort == names(5)


def test_ranks_set_what_share_of_the_indices_trains_where_all_hold_all_of_them() -> None:
    shares: dict[str, object] = {}

    def watched(task: flower.TrainTask, client: str) -> Update:
        shares[client] = task.assignment.get("share", 1.0)
        return replace(honest(task, client), adapter=task.adapter)

    config = settings(recipe="fed-plora", ranks={**dict.fromkeys(names(5), 2), **RANKS}, rounds=1)
    run(config, toy_app(watched))
    assert shares == {name: 0.5 if name in RANKS else 1.0 for name in names(5)}
    # A device says so itself; the others do what the recipe says.
    pieces = {"train": "random-ranks(share=0.75)"}
    told = settings(recipe="fed-plora", pieces=pieces, rounds=1)
    run(told, toy_app(watched, max_rank={"client-00002": 1}))
    assert shares == {name: 0.5 if name == "client-00002" else 0.75 for name in names(5)}


def test_the_trusted_client_is_asked_in_every_round_and_nothing_happens_without_it() -> None:
    config = settings(recipe="fltrust", trusted="client-00004", fraction=0.4, rounds=6)
    result = run(config)
    assert all("client-00004" in record.cohort for record in result.rounds[1:])
    assert {len(record.cohort) for record in result.rounds[1:]} == {2, 3}
    for record in result.rounds[1:]:
        assert record.influence["client-00004"] == 0

    def absent(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        fault = flower.ClientFault.NO_DATA
        return fault if client == "client-00004" else honest(task, client)

    alone = run(replace(config, rounds=1), toy_app(absent))
    assert alone.adapter.digest == START.digest
    assert "client-00004" in alone.rounds[1].unchanged


def test_too_few_for_a_robust_rule_leave_the_adapter_as_it_was() -> None:
    def failing(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        fault = flower.ClientFault.NO_DATA
        return fault if client < "client-00002" and task.round == 1 else honest(task, client)

    result = run(settings(recipe="krum", rounds=2), toy_app(failing))
    one, two = result.rounds[1:]
    assert one.adapter_out == one.adapter_in
    assert "2 f + 3" in one.unchanged
    assert sorted(two.influence.values()) == [0, 0, 0, 0, 1]
    # A coin may ask fewer than the rule needs: then nobody trains for nothing.
    coins = run(settings(recipe="krum", sampling="poisson", clients=12, fraction=0.5, rounds=8))
    sizes = {len(record.cohort) for record in coins.rounds[1:]}
    assert 0 in sizes
    assert min(sizes - {0}) >= 5


def test_the_influence_of_clients_is_on_record() -> None:
    record = run(settings(rounds=1)).rounds[1]
    assert record.influence == pytest.approx({n: (i + 1) / 15 for i, n in enumerate(names(5))})


def test_clients_measure_on_rows_of_their_own_if_some_are_kept_out() -> None:
    result = run(settings(rounds=2, holdout=0.25))
    for record in result.rounds[1:]:
        assert set(record.personal) == set(names(5))
        rows = {name: 10 + i for i, name in enumerate(names(5))}
        mean = sum(rows[n] / (2 + i) for i, n in enumerate(names(5))) / sum(rows.values())
        assert record.metrics["personal_accuracy"] == pytest.approx(mean)
        assert record.metrics["personal_loss"] == pytest.approx(1 - mean)
        assert record.metrics["personal_examples"] == sum(rows.values())
    assert result.rounds[1].bytes_measuring == 5 * WHOLE
    again = Round.from_document(result.rounds[1].to_document())
    assert again == result.rounds[1]
    assert run(settings(rounds=1)).rounds[1].personal == {}


def test_an_old_record_is_still_read() -> None:
    document = Round(number=1, adapter_in="a", adapter_out="b").to_document()
    for later in ("personal", "bytes_measuring", "influence", "unchanged"):
        del document[later]
    assert Round.from_document(document).personal == {}
    with pytest.raises(RoundsError, match="exactly the fields"):
        Round.from_document({k: v for k, v in document.items() if k != "cohort"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "fedlt"}, "did you mean 'fedit'"),
        ({"pieces": {"codec": "int9"}}, "int9"),
        ({"recipe": "fltrust"}, "trusted client"),
        ({"trusted": "client-00001"}, "trusts nobody"),
        ({"recipe": "fedit", "ranks": {"a": 1, "b": 2}}, "needs one rank"),
        ({"recipe": "bulyan"}, "5 of 5 clients"),
        ({"holdout": 0.95}, "holdout=0.95"),
        ({"ranks": {"a": 0}}, "ranks="),
        ({"buffer": 3}, "fedbuff"),
        ({"recipe": "dp-fedlora", "privacy": {"epsilon": 1.0}}, "leave privacy out"),
        ({"pieces": {"weigh": "staleness", "refactor": "svd-fold"}}, "choose refactor=svd"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(RoundsError, match=message):
        settings(**change)


def test_updates_travel_in_the_recipe_s_codec_and_errors_come_back() -> None:
    behave: Behaviour = honest
    plain = run(settings(recipe="fedit", rounds=2), toy_app(behave))
    small = run(settings(recipe="fedit", rounds=2, pieces={"codec": "int8"}), toy_app(behave))
    assert small.rounds[1].bytes_up < 0.3 * plain.rounds[1].bytes_up
    gap = np.abs(small.adapter.pack() - plain.adapter.pack()).max()
    assert 0 < gap < 0.01
