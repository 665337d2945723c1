"""Rounds with a secure sum over a grid: the right sum, or the adapter as it was and a reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.clipped_sum import transmitted
from aggregation.init import initial_adapter
from aggregation.parcel import sent_keys
from aggregation.recipes import RECIPES
from aggregation.update import Update
from clients.secure_desk import SecureDesk, SecureRequest
from clients.secure_identity import SecureIdentity
from federation.rounds import Round, RoundsConfig, RoundsError
from federation.secure_exchange import GIVEN_UP, SecureExchange
from federation.server_app import run_training
from federation.strategy import TrainingResult
from privacy.central import CentralPrivacy
from privacy.cohort_account import CohortAccount
from privacy.ledger import Ledger
from privacy.randomness import seeded_key
from privacy.secure_messages import Confirmation
from privacy.secure_session import SecureSumError
from privacy.secure_sum import SecureServer
from protos import flower
from simulations.grid import LocalGrid
from simulations.lanes import InProcess
from tests.aggregation.adapters import products
from tests.simulations.fair_grid import FairGrid
from tests.simulations.rounds import array_bytes
from tests.simulations.toy import START, honest, settings
from tests.simulations.toy_secure import Dies, secure_app, secure_settings

SECURE = [name for name, known in RECIPES.items() if known.describe()["secure_sum"]]
STEPS = ("train", *flower.STEPS)
NAMES = [flower.client_name(number) for number in range(12)]


def behaved(task: flower.TrainTask, client: str) -> Update:
    """An honest update that moves nothing which the recipe keeps frozen: the codec sees to it."""
    made = honest(task, client)
    return replace(made, weight=1.0 + int(client[-5:]) % 7)


def run(config: RoundsConfig, **keywords: object) -> TrainingResult:
    app = secure_app(behaved, **keywords)  # type: ignore[arg-type]
    with LocalGrid(app, config.clients) as grid:
        return run_training(grid, config, initial=initial_of(config))


def initial_of(config: RoundsConfig) -> Adapter:
    core = config.chosen().train.assignment(1).trains == "core"
    return initial_adapter(START.spec, seed=2) if core else START


def in_the_clear(config: RoundsConfig, only: Sequence[str]) -> Adapter:
    """The same round without a secure sum, with these clients alone."""
    plain = replace(config, pieces={**config.pieces, "private": "none"})
    app = secure_app(behaved, dies=lambda client, step, part: client not in only)
    with LocalGrid(app, config.clients) as grid:
        return run_training(grid, plain, initial=initial_of(config)).adapter


def killed_at(step: str, count: int, part: int = 0) -> Dies:
    """The first so many clients die when they are asked for a step."""
    return lambda client, asked, where: (asked, where) == (step, part) and client in NAMES[:count]


def far(one: Adapter, other: Adapter) -> float:
    return max(float(np.abs(value - other.tensors[key]).max()) for key, value in one)


@pytest.mark.parametrize("name", SECURE)
def test_every_recipe_gives_what_it_gives_in_the_clear(name: str, tmp_path: Path) -> None:
    config = secure_settings(tmp_path, clients=4, recipe=name, rounds=2)
    result = run(config)
    assert [r.unchanged for r in result.rounds] == ["", "", ""]
    record = result.rounds[-1]
    assert len(record.used) == record.secure["summed"] == 4
    assert record.weights == record.influence == {}
    assert record.secure["weight"] == pytest.approx(10.0)
    assert record.secure["bound"] < 1e-6
    clear = in_the_clear(config, NAMES)
    if not RECIPES[name].refactor.turns:
        assert far(result.adapter, clear) < 2e-5
    for module, matrix in products(clear).items():
        assert np.abs(products(result.adapter)[module] - matrix).max() < 2e-4
    assert result.adapter.digest != START.digest


@pytest.mark.parametrize("step", STEPS)
def test_who_dies_at_a_step_is_recorded_and_the_sum_is_right(step: str, tmp_path: Path) -> None:
    config = secure_settings(tmp_path)
    record, adapter = _last(run(config, dies=killed_at(step, 3)))
    in_sum = NAMES if step in ("confirm", "reveal") else NAMES[3:]
    assert sorted(record.used) == in_sum
    assert set(record.refused) == set(NAMES) - set(in_sum)
    assert record.secure["summed"] == len(in_sum)
    if step != "train":
        assert set(record.secure["dropped"]) == set(NAMES[:3])
        assert all(said.startswith(f"{step}: ") for said in record.secure["dropped"].values())
    assert far(adapter, in_the_clear(config, in_sum)) < 2e-6


@pytest.mark.parametrize("step", flower.STEPS)
def test_with_too_few_the_round_is_given_up_and_nothing_is_unmasked(
    step: str, tmp_path: Path
) -> None:
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    config = secure_settings(tmp_path)
    record, adapter = _last(run(config, dies=killed_at(step, 4), seen=seen))
    assert adapter.digest == START.digest
    assert record.adapter_out == record.adapter_in
    assert "given up" in record.unchanged
    assert record.used == ()
    assert set(record.refused) == set(NAMES)
    assert GIVEN_UP in record.refused.values()
    revealed = [blobs for (_, asked, _), blobs in seen.items() if asked == "reveal"]
    # Threshold 9 of 12: eight pieces of a secret say nothing about it.
    pieces = [sum(f"own/{name}" in blobs for blobs in revealed) for name in NAMES]
    assert max(pieces) <= (8 if step == "reveal" else 0)


@pytest.mark.parametrize("step", ["sketch", "keys", "masked", "confirm", "reveal"])
def test_two_sums_are_of_the_same_clients_or_of_nobody(step: str, tmp_path: Path) -> None:
    config = secure_settings(tmp_path, recipe="fedask", pieces={"refactor": "svd"})
    record, adapter = _last(run(config, dies=killed_at(step, 1, part=1)))
    if step in ("confirm", "reveal"):  # after their vectors were in
        assert len(record.used) == 12
        clear = in_the_clear(config, NAMES)
        for module, matrix in products(clear).items():
            assert np.abs(products(adapter)[module] - matrix).max() < 1e-3
    else:
        assert "given up" in record.unchanged
        assert adapter.digest == START.digest
        assert NAMES[0] in record.secure["dropped"]


def test_a_run_goes_on_after_a_round_that_was_given_up(tmp_path: Path) -> None:
    asked: list[int] = []

    def dies(client: str, step: str, part: int) -> bool:
        asked.append(1) if (client, step) == (NAMES[0], "masked") else None
        return step == "masked" and len(asked) <= 1

    result = run(secure_settings(tmp_path, rounds=2), dies=dies)
    assert bool(result.rounds[1].unchanged)
    assert result.rounds[2].unchanged == ""
    assert len(result.rounds[2].used) == 12


def test_values_out_of_range_stay_on_their_client(tmp_path: Path) -> None:
    def wild(task: flower.TrainTask, client: str) -> Update:
        made = behaved(task, client)
        if client != NAMES[5]:
            return made
        return replace(made, adapter=Adapter(START.spec, {k: v + 5 for k, v in made.adapter}))

    config = secure_settings(tmp_path)
    with LocalGrid(secure_app(wild), 12) as grid:
        record, adapter = _last(run_training(grid, config, initial=START))
    assert record.refused == {NAMES[5]: "out-of-range"}
    assert far(adapter, in_the_clear(config, [n for n in NAMES if n != NAMES[5]])) < 2e-6


class Carrying(LocalGrid):
    """Counts the bytes of all arrays, in both directions."""

    up = down = 0

    def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
        def outgoing() -> Iterator[Message]:
            for message in messages:
                self.down += array_bytes(message)
                yield message

        for reply in super().send_and_receive(outgoing(), timeout=timeout):
            self.up += array_bytes(reply)
            yield reply


@pytest.mark.parametrize("bits", [32, 24])
def test_every_byte_is_counted_and_a_value_takes_what_was_promised(
    bits: int, tmp_path: Path
) -> None:
    pieces = {"private": f"secure-sum(max_weight=64, bits={bits})"}
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    config = secure_settings(tmp_path, pieces=pieces)
    with Carrying(secure_app(behaved, seen=seen), 12) as grid:
        record, _ = _last(run_training(grid, config, initial=START))
        assert (record.bytes_up, record.bytes_down) == (grid.up, grid.down)
    weight = 2  # 30 bits of it, in digits of 27 or 19 bits
    assert len(seen[NAMES[0], "masked", 0]["vector"]) == (START.spec.size + weight) * bits // 8


def test_a_step_waits_for_its_share_of_the_deadline_and_goes_on(tmp_path: Path) -> None:
    """Three clients hang, each at a step of its own: each costs the round one step's wait."""
    release, waited, hung = threading.Event(), list[float](), set[str]()
    hanging = dict(zip(("keys", "masked", "confirm"), NAMES[2:5], strict=True))

    def hangs(client: str, step: str, part: int) -> bool:
        if hanging.get(step) != client:
            return False
        hung.add(client)
        return release.wait(240)

    class Timed(FairGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            waited.append(timeout)
            return super().send_and_receive(messages, timeout=timeout)

    config = secure_settings(tmp_path, deadline_seconds=40.0, step_share=0.01)
    lanes = [InProcess() for _ in NAMES]
    with Timed(secure_app(behaved, dies=hangs), 12, hung=hung, workers=lanes) as grid:
        record, adapter = _last(run_training(grid, config, initial=START))
        release.set()
    assert waited[-5:] == [pytest.approx(0.4)] * 5  # of each step, and no deadline of 40
    assert record.secure["dropped"] == {name: f"{step}: late" for step, name in hanging.items()}
    inside = [name for name in NAMES if name not in (NAMES[2], NAMES[3])]
    assert sorted(record.used) == inside
    assert far(adapter, in_the_clear(config, inside)) < 2e-6
    with pytest.raises(RoundsError, match="step_share"):
        settings(step_share=0.0)


class Lying(SecureExchange):
    """A server that tells half of the members another list of survivors."""

    def _confirm(self, part: int, survivors: Sequence[str]) -> Iterator[Confirmation]:
        half = len(survivors) // 2
        lists = dict.fromkeys(survivors[:half], survivors)
        # The others are told that one who has sent did drop out: both kinds of its pieces would do.
        lists |= dict.fromkeys(survivors[half:], survivors[1:])
        tasks = {c: self._task(part, "confirm", names=said) for c, said in lists.items()}
        for client, blobs in self._step(part, tasks):
            yield Confirmation(client, blobs.get("signature", b""))


def test_a_server_that_lies_about_the_survivors_learns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.secure_exchange.SecureExchange", Lying)
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    record, adapter = _last(run(secure_settings(tmp_path), seen=seen))
    confirmed = {client for client, step, _ in seen if step == "confirm"}
    assert confirmed == set(NAMES)  # all have signed, each its own list
    assert not [client for client, step, _ in seen if step == "reveal"]
    assert "given up" in record.unchanged
    assert adapter.digest == START.digest


def test_a_server_that_swaps_keys_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_keys = SecureServer.keys

    def swapped(self: SecureServer, messages):  # type: ignore[no-untyped-def]
        mine = [replace(m, masking=bytes(31) + b"\7") for m in messages]
        return honest_keys(self, mine)

    monkeypatch.setattr(SecureServer, "keys", swapped)
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    record, _ = _last(run(secure_settings(tmp_path), seen=seen))
    assert {step for _, step, _ in seen} == {"keys"}
    assert "given up" in record.unchanged


def test_a_vector_enters_one_session_and_a_device_one_sum_of_a_round(tmp_path: Path) -> None:
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] = {}
    desk, config = SecureDesk(once=True), secure_settings(tmp_path)
    first, _ = _last(run(config, desk=desk, seen=seen))
    assert len(first.used) == 12
    # The round once more, as if the server had crashed, without one of them this time.
    again, adapter = _last(run(config, desk=desk, dies=killed_at("train", 1)))
    assert again.used == ()
    assert adapter.digest == START.digest
    identity = SecureIdentity(
        roster=str(flower.client_roster(config.data_folder)), seed=config.seed
    )
    request = SecureRequest(
        client=NAMES[1], run="toy", round=1, part=0, step="keys", names=tuple(NAMES),
        identity=identity,
    )  # fmt: skip
    with pytest.raises(SecureSumError, match="already"):
        desk.step(request)


@pytest.mark.parametrize("given_up", [False, True])
def test_noise_is_added_to_the_sum_and_released_even_if_that_was_given_up(
    given_up: bool, tmp_path: Path
) -> None:
    promised = CentralPrivacy(rounds=1, clients=12, delta=0.05, noise_multiplier=1e-6, clip=0.5)
    config = secure_settings(tmp_path, recipe="ffa-lora", client_privacy=promised)
    assert config.chosen().private.kind == "secure-client-dp"
    ledger = Ledger(tmp_path / "server.sqlite")
    account = CohortAccount(promised, run="toy", ledger=ledger, key=seeded_key(1))
    trained: dict[str, Update] = {}
    dies = killed_at("masked", 4 if given_up else 0)
    app = secure_app(behaved, dies=dies, trained=trained)
    with LocalGrid(app, 12) as grid:
        result = run_training(grid, config, initial=START, account=account)
    record, adapter = _last(result)
    assert [event.steps for event in account.events()] == [1]
    ledger.close()
    assert adapter.digest != START.digest
    keys = sent_keys(START.spec, Assignment(trains="B", sends="B"))
    total = np.zeros(sum(START.tensors[key].size for key in keys))
    for update in () if given_up else trained.values():
        change = transmitted(update.adapter, START, keys)
        total += change * min(1.0, 0.5 / float(np.linalg.norm(change))) / 12
    moved = np.concatenate([(adapter.tensors[k] - START.tensors[k]).ravel() for k in keys])
    assert np.abs(moved - total).max() < 1e-5
    assert bool(record.secure["given_up"]) == given_up
    assert record.unchanged == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": 2}, "at least 3"),
        ({"recipe": "svd-warm-start"}, "choose reduce=factor-mean"),
        ({"pieces": {"private": "secure-sum(bits=16)"}, "clients": 40_000}, "no level left"),
    ],
)
def test_runs_that_cannot_be_summed_are_refused_at_once(
    changes: dict[str, object], said: str
) -> None:
    fields = {"recipe": "fedit", "clients": 5, "pieces": {"private": "secure-sum"}, **changes}
    with pytest.raises(RoundsError, match=said):
        settings(**fields)


def _last(result: TrainingResult) -> tuple[Round, Adapter]:
    return result.rounds[-1], result.adapter
