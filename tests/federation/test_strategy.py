from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError
from aggregation.update import Update
from federation.checkpoint import CheckpointError
from federation.cohort import CohortError, draw, gather
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.server_app import run_training
from federation.strategy import Reply, TrainingResult
from protos import flower
from simulations.grid import LocalGrid
from tests.simulations.toy import SPEC, START, Behaviour, honest, lying, settings, toy_app


def run(
    behave: Behaviour = honest,
    config: RoundsConfig | None = None,
    checkpoint: Path | None = None,
    on_round: object = lambda _: None,
    replies: list[Reply] | None = None,
) -> TrainingResult:
    config = config or settings()
    with LocalGrid(toy_app(behave), config.clients) as grid:
        return run_training(
            grid,
            config,
            initial=START,
            evaluate=lambda adapter, _: {"norm": float(np.linalg.norm(adapter.pack()))},
            on_round=on_round,  # type: ignore[arg-type]
            on_reply=replies.append if replies is not None else lambda _: None,
            checkpoint=checkpoint,
        )


def test_a_run_records_everything_it_did() -> None:
    replies: list[Reply] = []
    result = run(replies=replies)
    assert [r.number for r in result.rounds] == [0, 1, 2, 3]
    start, first = result.rounds[:2]
    assert start.adapter_in == start.adapter_out == START.digest
    assert first.adapter_in == START.digest != first.adapter_out
    assert result.rounds[2].adapter_in == first.adapter_out
    assert first.cohort == first.used == tuple(flower.client_name(i) for i in range(5))
    assert first.bytes_down == first.bytes_up == 5 * START.nbytes
    assert first.weights == {flower.client_name(i): i + 1.0 for i in range(5)}
    assert first.metrics["norm"] != start.metrics["norm"]
    assert 0 < first.aggregation_error < 1
    assert result.adapter.digest == result.rounds[-1].adapter_out
    assert len(replies) == 15
    assert (replies[0].round, replies[0].client, replies[0].refused) == (1, "client-00000", "")
    assert 0 <= replies[0].seconds < 20


def test_the_head_is_the_weighted_mean() -> None:
    result = run(config=settings(rounds=1))
    task = flower.TrainTask(run="toy", round=1, adapter=START, plan={}, seed=11)
    updates = [honest(task, flower.client_name(i)) for i in range(5)]
    key = "base_model.model.classifier.weight"
    expected = sum(u.weight * u.adapter.tensors[key].astype(float) for u in updates) / 15
    assert np.allclose(result.adapter.tensors[key], expected, atol=1e-6)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_dies_goes_on_where_it_was(tmp_path: Path, after: int) -> None:
    def die(record: Round) -> None:
        if record.number == after:
            raise StopHereError

    whole = run()
    with pytest.raises(StopHereError):
        run(checkpoint=tmp_path, on_round=die)
    asked: list[int] = []

    def watched(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        asked.append(task.round)
        return honest(task, client)

    rest: list[Round] = []
    result = run(watched, checkpoint=tmp_path, on_round=rest.append)
    assert sorted(set(asked)) == list(range(after + 1, 4))
    assert [r.number for r in rest] == list(range(after + 1, 4))
    assert result.adapter.digest == whole.adapter.digest
    assert [replace(r, seconds=0) for r in result.rounds] == [
        replace(r, seconds=0) for r in whole.rounds
    ]
    # A finished run has nothing left to do.
    again = run(lying(weight=math.nan), checkpoint=tmp_path)
    assert again.adapter.digest == whole.adapter.digest


def test_a_damaged_state_falls_back_to_the_round_before(tmp_path: Path) -> None:
    whole = run(checkpoint=tmp_path)
    state = tmp_path / "round-00003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    assert run(checkpoint=tmp_path).adapter.digest == whole.adapter.digest
    for path in tmp_path.glob("*/state.safetensors"):
        path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no state of the run is readable"):
        run(checkpoint=tmp_path)


def test_half_written_checkpoints_are_ignored_and_foreign_ones_refused(tmp_path: Path) -> None:
    whole = run(checkpoint=tmp_path, config=settings(rounds=1))
    partial = tmp_path / "round-00002.partial"
    partial.mkdir()
    (partial / "round.json").write_text("{")
    again = run(checkpoint=tmp_path, config=settings(rounds=1))
    assert again.adapter.digest == whole.adapter.digest
    with pytest.raises(CheckpointError, match="belongs to run 'toy'"):
        run(checkpoint=tmp_path, config=settings(run="other"))
    (tmp_path / "round-00001" / "round.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run(checkpoint=tmp_path)


def test_old_states_are_removed_and_records_are_kept(tmp_path: Path) -> None:
    run(checkpoint=tmp_path, config=settings(rounds=4))
    assert len(list(tmp_path.glob("*/round.json"))) == 5
    names = sorted(p.parent.name for p in tmp_path.glob("*/state.safetensors"))
    assert names == ["round-00003", "round-00004"]


def bad_adapter(value: float) -> Adapter:
    tensors = {k: np.array(v) for k, v in START}
    tensors["base_model.model.classifier.weight"][0, 0] = value
    return Adapter(SPEC, tensors)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda task, client: flower.ClientFault.NO_DATA, "no-data"),
        (lambda task, client: flower.ClientFault.BUDGET_EXCEEDED, "budget-exceeded"),
        (lambda task, client: 1 / 0, "flower-2"),
        (lying(weight=0.0), "bad-weight"),
        (lying(weight=math.nan), "bad-weight"),
        (lying(adapter=bad_adapter(math.inf)), "not-finite"),
        (lying(start="sha256:" + "1" * 64), "unknown-start"),
        (lying(client="client-00000"), "wrong-client"),
        (lying(client="../../etc"), "malformed"),
        (lying(round=9), "wrong-round"),
        (
            lying(adapter=Adapter.zeros(replace(SPEC, base_digest="sha256:" + "2" * 64))),
            "wrong-base",
        ),
    ],
)
def test_a_bad_client_is_left_out_with_its_reason(behave: Behaviour, reason: str) -> None:
    def mixed(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        return behave(task, client) if client == "client-00003" else honest(task, client)

    def absent(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        fault = flower.ClientFault.NO_DATA
        return fault if client == "client-00003" else honest(task, client)

    result = run(mixed, settings(rounds=2))
    assert [r.refused for r in result.rounds[1:]] == [{"client-00003": reason}] * 2
    assert "client-00003" not in result.rounds[1].used
    assert result.adapter.digest == run(absent, settings(rounds=2)).adapter.digest


def test_too_few_updates_change_nothing_and_the_run_goes_on() -> None:
    def flaky(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        if task.round == 2 and client != "client-00000":
            return flower.ClientFault.TRAINING_FAILED
        return honest(task, client)

    result = run(flaky, settings(min_updates=2))
    one, two, three = result.rounds[1:]
    assert two.adapter_out == two.adapter_in == one.adapter_out
    assert two.used == ("client-00000",)
    assert three.adapter_out != three.adapter_in
    assert len(three.used) == 5


def test_nobody_usable_is_not_the_end() -> None:
    result = run(lambda task, client: flower.ClientFault.NO_DATA)
    assert result.adapter.digest == START.digest
    assert len(result.rounds) == 4


def test_the_cohort_depends_on_seed_round_and_names_only() -> None:
    names = [flower.client_name(i) for i in range(50)]
    assert draw(names, 1, 0.2, "fixed", 1) == draw(names[::-1], 1, 0.2, "fixed", 1)
    assert len(draw(names, 1, 0.2, "fixed", 1)) == 10
    assert len({draw(names, n, 0.2, "fixed", 1) for n in range(20)}) == 20
    sizes = [len(draw(names, n, 0.2, "poisson", 1)) for n in range(200)]
    assert len(set(sizes)) > 5
    assert abs(np.mean(sizes) - 10) < 1
    # Adding a client moves nobody else's coin.
    few = draw(names[:-1], 3, 0.5, "poisson", 1)
    assert set(few) == set(draw(names, 3, 0.5, "poisson", 1)) - {names[-1]}


def test_a_fraction_asks_only_some() -> None:
    result = run(config=settings(fraction=0.4))
    assert [len(r.cohort) for r in result.rounds] == [0, 2, 2, 2]
    assert all(r.bytes_down == 2 * START.nbytes for r in result.rounds[1:])


def test_waiting_for_clients_has_an_end() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(CohortError, match="no client connected within 5 s"):
        gather(list, wanted=3, seconds=5, clock=lambda: now[0], sleep=sleep)
    assert 5 <= now[0] < 7
    assert gather(lambda: [2, 1], wanted=3, seconds=5, clock=lambda: now[0], sleep=sleep) == [1, 2]
    assert gather(lambda: [2, 1], wanted=2, seconds=5, clock=lambda: now[0], sleep=lambda _: None)


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"fraction": 0.0}, {"sampling": "x"}, {"min_updates": 0}]
)
def test_settings_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RoundsError, match=next(iter(change))):
        settings(**change)


def test_a_round_with_other_fields_is_refused() -> None:
    document = Round(number=1, adapter_in="a", adapter_out="b").to_document()
    with pytest.raises(RoundsError, match="exactly the fields"):
        Round.from_document({**document, "more": 1})


def test_a_disk_that_is_full_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(AggregationError, match="cannot write"):
        run(checkpoint=blocked / "checkpoints")
