"""FedBuff over a grid: who is at work, what a step is made of, and that nothing depends on luck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from aggregation.adapter import Adapter
from aggregation.update import Update
from federation import flights
from federation.buffered import BufferedStrategy
from federation.checkpoint import Checkpoints
from federation.flights import simulated_seconds
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.server_app import run_training
from federation.strategy import Reply, TrainingResult
from protos import flower
from simulations.grid import FIRST_NODE, InProcess, LocalGrid
from tests.aggregation.adapters import products, relative
from tests.simulations.fair_grid import FairGrid
from tests.simulations.toy import SPEC, START, Behaviour, honest, lying, settings, toy_app


def buffered(**changes: object) -> RoundsConfig:
    """Six versions of three updates; five of eight simulated clients are at work."""
    fields = {
        "recipe": "fedbuff", "clients": 8, "fraction": 0.6, "buffer": 3, "rounds": 6,
        "data_folder": "simulated", **changes,
    }  # fmt: skip
    return settings(**fields)


def run(
    behave: Behaviour = honest,
    config: RoundsConfig | None = None,
    checkpoint: Path | None = None,
    lanes: int = 1,
    on_round: Callable[[Round], None] = lambda _: None,
    replies: list[Reply] | None = None,
) -> TrainingResult:
    config = config or buffered()
    workers = [InProcess() for _ in range(lanes)]
    with LocalGrid(toy_app(behave), config.clients, workers=workers) as grid:
        return run_training(
            grid,
            config,
            initial=START,
            on_round=on_round,
            on_reply=replies.append if replies is not None else lambda _: None,
            checkpoint=checkpoint,
        )


class Watched:
    """Honest clients, and everything that they were asked and have answered."""

    def __init__(self, behave: Behaviour = honest) -> None:
        self.behave = behave
        self.asked: list[tuple[str, int]] = []
        self.tasks: dict[tuple[str, int], flower.TrainTask] = {}
        self.answers: dict[tuple[str, int], Update] = {}
        self._lock = threading.Lock()

    def __call__(self, task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        answer = self.behave(task, client)
        with self._lock:
            self.asked.append((client, task.round))
            self.tasks[client, task.round] = task
            if isinstance(answer, Update):
                self.answers[client, task.round] = answer
        return answer


def test_every_step_is_the_discounted_mean_of_what_its_clients_changed() -> None:
    watched, replies = Watched(), []
    result = run(watched, replies=replies)
    assert [r.number for r in result.rounds] == list(range(7))
    delays: list[int] = []
    dense = products(START)
    for record in result.rounds[1:]:
        assert len(record.used) == 3
        assert not record.refused
        total = sum(record.weights.values())
        for client in record.used:
            behind = int(record.client_metrics[client]["staleness"])
            delays.append(behind)
            asked = client, record.number - behind
            start, trained = watched.tasks[asked].adapter, watched.answers[asked].adapter
            share = record.weights[client] / total * (1 + behind) ** -0.5
            assert record.influence[client] == pytest.approx(share)
            for name in dense:
                dense[name] += share * (products(trained)[name] - products(start)[name])
    for name, matrix in dense.items():
        assert relative(result.state.exact(name).dense(), matrix) < 1e-5
    assert len(set(delays)) > 1
    assert max(delays) <= 10
    # Nobody is asked twice in a version, and five are at work at any time.
    assert len(set(watched.asked)) == len(watched.asked)
    asked = [client for record in result.rounds for client in record.cohort]
    assert len(asked) == 5 + 3 * 6 - 1  # the last landing is not replaced
    assert len(replies) == 18
    assert all(r.bytes_down == len(r.cohort) * START.nbytes for r in result.rounds)


def test_the_number_of_workers_changes_nothing() -> None:
    results = [run(lanes=lanes) for lanes in (1, 2, 5)]
    for other in results[1:]:
        assert other.adapter.digest == results[0].adapter.digest
        assert [replace(r, seconds=0) for r in other.rounds] == [
            replace(r, seconds=0) for r in results[0].rounds
        ]
    assert run(config=buffered(seed=12)).adapter.digest != results[0].adapter.digest


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_run_that_dies_goes_on_with_the_same_clients_at_work(tmp_path: Path, after: int) -> None:
    def die(record: Round) -> None:
        if record.number == after:
            raise StopHereError

    watched = Watched()
    whole = run(watched)
    with pytest.raises(StopHereError):
        run(checkpoint=tmp_path, on_round=die)
    again = Watched()
    result = run(again, checkpoint=tmp_path)
    assert result.adapter.digest == whole.adapter.digest

    def comparable(records: Iterable[Round]) -> list[Round]:
        return [replace(r, seconds=0, bytes_down=0) for r in records]

    assert comparable(result.rounds) == comparable(whole.rounds)
    # Whoever was at work got the same start once more; those still at work at the end may not run.
    for key in again.tasks.keys() & watched.tasks.keys():
        assert again.tasks[key].adapter.digest == watched.tasks[key].adapter.digest
    done = run(lying(weight=0.0), checkpoint=tmp_path)
    assert done.adapter.digest == whole.adapter.digest


def test_if_it_is_not_known_who_was_at_work_clients_are_asked_anew(tmp_path: Path) -> None:
    def die(record: Round) -> None:
        if record.number == 3:
            raise StopHereError

    for damage in (b"nonsense", b"", b'{"schema": 9}', b'{"schema": 1, "flights": 3}'):
        folder = tmp_path / str(len(damage))
        with pytest.raises(StopHereError):
            run(checkpoint=folder, on_round=die)
        (folder / "round-00003" / flights.FLIGHTS).write_bytes(damage)
        watched = Watched()
        result = run(watched, checkpoint=folder)
        assert [r.number for r in result.rounds] == list(range(7))
        assert min(version for _, version in watched.asked) == 4
    kept = sorted(p.parent.name for p in folder.glob("*/version-*.safetensors"))
    assert set(kept) <= {"round-00005", "round-00006"}


def test_what_was_started_too_long_ago_is_refused_and_its_start_is_forgotten() -> None:
    config = buffered(max_staleness=1, fraction=1.0, buffer=2, rounds=10)
    strategies: list[BufferedStrategy] = []
    kept: list[int] = []

    def look(record: Round) -> None:
        kept.append(len(strategies[0]._versions))
        assert all(
            flight.start is None or flight.version >= record.number - 1
            for flight in strategies[0]._flights.values()
        )

    with LocalGrid(toy_app(), config.clients) as grid:
        strategies.append(BufferedStrategy(config, START, on_round=look))
        result = strategies[0].start(grid)
    reasons = [reason for r in result.rounds for reason in r.refused.values()]
    assert set(reasons) == {"stale"}
    delays = [m["staleness"] for r in result.rounds for m in r.client_metrics.values()]
    assert max(delays) == 1
    assert max(kept) == 2


def bad_adapter(task: flower.TrainTask) -> Adapter:
    tensors = {k: np.array(v) for k, v in task.adapter}
    tensors["base_model.model.classifier.weight"][0, 0] = np.inf
    return Adapter(SPEC, tensors)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda task, client: flower.ClientFault.NO_DATA, "no-data"),
        (lambda task, client: 1 / 0, "flower-2"),
        (
            lambda task, client: replace(honest(task, client), adapter=bad_adapter(task)),
            "not-finite",
        ),
        (lying(weight=0.0), "bad-weight"),
        (lying(start="sha256:" + "1" * 64), "unknown-start"),
        (lying(client="client-00000"), "wrong-client"),
        # Claiming to be fresher would mean to count more.
        (lambda task, client: replace(honest(task, client), round=task.round + 1), "wrong-round"),
    ],
)
def test_a_bad_client_is_replaced_by_another(behave: Behaviour, reason: str) -> None:
    def mixed(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        return behave(task, client) if client == "client-00003" else honest(task, client)

    result = run(mixed)
    refused = [r.refused for r in result.rounds if r.refused]
    assert refused
    assert all(r == {"client-00003": reason} for r in refused)
    assert all(len(r.used) == 3 for r in result.rounds[1:])


class Lossy(LocalGrid):
    """A grid that cannot reach one of its nodes, and says so as Flower's do: by silence."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        reachable = [m for m in messages if m.metadata.dst_node_id != FIRST_NODE + 3]
        return super().push_messages(reachable)


def test_a_client_that_cannot_be_reached_is_replaced_by_another() -> None:
    config = buffered()
    with Lossy(toy_app(), config.clients) as grid:
        result = run_training(grid, config, initial=START)
    refused = [r.refused for r in result.rounds if r.refused]
    assert refused
    assert all(r == {"client-00003": "unreachable"} for r in refused)
    assert all(len(r.used) == 3 for r in result.rounds[1:])


def test_if_everybody_fails_the_versions_pass_and_nothing_changes() -> None:
    watched = Watched(lambda task, client: flower.ClientFault.NO_DATA)
    result = run(watched, buffered(rounds=2))
    assert result.adapter.digest == START.digest
    for record in result.rounds[1:]:
        assert set(record.refused.values()) == {"no-data"}
        assert len(record.refused) == 8
        assert record.unchanged.startswith("0 usable updates")
    assert sorted(watched.asked) == [(flower.client_name(i), v) for i in range(8) for v in (1, 2)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_client_that_never_answers_holds_up_nobody(lanes: int) -> None:
    free, hung = threading.Event(), set[str]()

    def stuck(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        if client == "client-00003" and task.round == 1:
            hung.add(client)
            free.wait(240)
        return honest(task, client)

    config, workers = buffered(fraction=1.0, deadline_seconds=0.3), [InProcess()] * lanes
    with FairGrid(toy_app(stuck), config.clients, hung=hung, workers=workers) as grid:
        try:
            result = run_training(grid, config, initial=START)
        finally:
            free.set()
    late = [r for r in result.rounds if r.refused]
    assert [r.refused for r in late] == [{"client-00003": "late"}]
    assert all(len(r.used) == 3 for r in result.rounds[1:])


def test_real_clients_are_taken_as_they_come() -> None:
    """The one that a simulation would wait for first is held back, and the others go on."""
    config = buffered(data_folder="", fraction=1.0, rounds=2, deadline_seconds=240)
    names = [flower.client_name(i) for i in range(8)]
    first = min(names, key=lambda name: simulated_seconds(11, name, 1))
    free = threading.Event()

    def slow(task: flower.TrainTask, client: str) -> Update | flower.ClientFault:
        if client == first and task.round == 1:
            free.wait(240)
        return honest(task, client)

    try:
        result = run(
            slow, config, lanes=8, on_round=lambda r: free.set() if r.number == 2 else None
        )
    finally:
        free.set()
    assert all(len(r.used) == 3 and first not in r.used for r in result.rounds[1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"buffer": 9}, r"buffer = 9.*1\.\.8"),
        ({"min_updates": 4}, r"4\.\.8"),
        ({"holdout": 0.2}, "holdout = 0.2"),
        ({"sampling": "poisson"}, "sampling = 'poisson'"),
        ({"recipe": "fedit", "buffer": 3}, "choose recipe fedbuff"),
        ({"pieces": {"reduce": "sketch"}}, "choose reduce=product-sum"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(RoundsError, match=said):
        buffered(**change)


def test_simulated_clients_differ_in_speed() -> None:
    means = [np.mean([simulated_seconds(0, f"c{k}", v) for v in range(200)]) for k in range(20)]
    assert max(means) > 2 * min(means) > 0


def test_further_files_of_a_checkpoint_come_back_and_go_with_the_state(tmp_path: Path) -> None:
    run(checkpoint=tmp_path)
    points = Checkpoints(tmp_path, "toy")
    assert flights.FLIGHTS in points.kept(6)
    assert points.kept(1) == {}
