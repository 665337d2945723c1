"""The ClientApp through Flower's own objects; no reply carries the text of an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from aggregation.init import initial_adapter
from clients import client_app
from clients.base import BaseRef
from clients.data import DataSource
from clients.model import adapter_spec
from clients.trainer import ResidentTrainer
from clients.training import ClientJob, TrainingPlan
from privacy.budget import LocalPrivacy
from privacy.ledger import Ledger
from protos import flower
from protos.flower import ClientFault
from tests.device.tiny import LABELS, make_base

PLAN = TrainingPlan(sample_rate=0.25, steps=3, learning_rate=0.02)
PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-3, rounds=2)


def ask(record: RecordDict, kind: str, node: dict[str, Any]) -> Message:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    message = Message(record, dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m1"
    context = Context(1, 1, node, RecordDict(), {})
    return client_app.app(message, context)


@pytest.fixture
def task(base: BaseRef, data_file: Path) -> dict[str, Any]:
    spec = adapter_spec(base, LABELS, rank=2, alpha=4.0, layers=(1,))
    return {
        "run": "r",
        "round": 1,
        "adapter": initial_adapter(spec, seed=1),
        "plan": PLAN.to_mapping(),
        "privacy": PRIVATE.to_mapping(),
        "seed": 3,
        "data_folder": str(data_file.parent),
        "base": str(base.path),
    }


def train(task: dict[str, Any], node: dict[str, Any]) -> Message:
    return ask(flower.train_task_record(flower.TrainTask(**task)), flower.TRAIN, node)


def test_a_simulated_client_trains_as_the_trainer_does(
    task: dict[str, Any], base: BaseRef, data_file: Path
) -> None:
    found = flower.update_from(train(task, {"partition-id": 3, "num-partitions": 9}).content)
    assert (found.client, found.round, found.weight) == ("client-00003", 1, 60.0)
    direct = ResidentTrainer(base, threads=1).train(
        [
            ClientJob(
                client="client-00003",
                run="r",
                round=1,
                adapter=task["adapter"],
                data=DataSource(data_file),
                plan=PLAN,
                privacy=PRIVATE,
                seed=3,
            )
        ]
    )[0]
    assert found.adapter.digest == direct.adapter.digest  # type: ignore[union-attr]
    ledger = Ledger(data_file.parent.parent / "ledger.sqlite")
    assert [e.event.to_mapping() for e in ledger.table("client-00003")] == [found.privacy_event]


def test_the_model_is_loaded_once_per_process(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clients import model as models

    built: list[int] = []
    build = models.build
    monkeypatch.setattr(models, "build", lambda *a: built.append(1) or build(*a))
    for number in (1, 2):
        train({**task, "round": number}, {"partition-id": 3})
    assert len(built) <= 1


def test_a_device_uses_its_own_data_ledger_and_secret(
    task: dict[str, Any], base: BaseRef, data_file: Path, tmp_path: Path
) -> None:
    node = {
        "client": "kitchen",
        "data": str(data_file),
        "base": str(base.path),
        "ledger": str(tmp_path / "own" / "ledger.sqlite"),
    }
    task = {**task, "data_folder": "", "base": "minilm"}
    first = flower.update_from(train(task, node).content)
    assert first.client == "kitchen"
    assert (tmp_path / "own" / "ledger.sqlite.key").stat().st_mode & 0o777 == 0o600
    other_seed = flower.update_from(train({**task, "seed": 4}, node).content)
    assert other_seed.adapter.digest == first.adapter.digest  # the server's seed has no say
    assert Ledger(tmp_path / "own" / "ledger.sqlite").head().count == 1


def test_evaluation_and_identity(task: dict[str, Any]) -> None:
    values = {k: task[k] for k in ("run", "round", "adapter", "plan", "data_folder", "base")}
    record = flower.evaluate_task_record(flower.EvaluateTask(**values))
    reply = ask(record, flower.EVALUATE, {"partition-id": 3})
    result = flower.evaluate_result_from(reply.content)
    assert (result.client, result.examples) == ("client-00003", 60)
    assert 0.0 <= result.accuracy <= 1.0
    reply = ask(RecordDict(), flower.IDENTITY, {"partition-id": 3})
    assert flower.identity_from(reply.content).client == "client-00003"


SECRET = "my mother's illness"


def test_no_fault_carries_the_text_of_an_exception(
    task: dict[str, Any], base: BaseRef, data_file: Path, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", seed=1)
    foreign = initial_adapter(adapter_spec(other, LABELS, rank=2, alpha=4.0), seed=1)
    private = data_file.parent / "client-00004.jsonl"
    private.write_text(f'{{"text": "x", "label": "{SECRET}"}}\n')
    here = {"partition-id": 3}
    cases: list[tuple[dict[str, Any], dict[str, Any], ClientFault]] = [
        ({}, {"partition-id": 4}, ClientFault.BAD_DATA),
        ({}, {"partition-id": 5}, ClientFault.NO_DATA),
        ({"data_folder": ""}, here, ClientFault.NO_DATA),
        ({}, {}, ClientFault.BAD_TASK),
        ({"adapter": foreign}, here, ClientFault.WRONG_BASE),
        ({"base": "no-such-base"}, here, ClientFault.WRONG_BASE),
        ({"plan": {"epochs": -1}}, here, ClientFault.BAD_TASK),
        ({"privacy": {"delta": 0}}, here, ClientFault.BAD_TASK),
        ({"plan": {"batch_size": 99}}, here, ClientFault.BAD_TASK),
        (
            {"privacy": {"delta": 1e-3, "epsilon": 0.1, "noise_multiplier": 0.5}},
            here,
            ClientFault.BUDGET_EXCEEDED,
        ),
        ({}, {**here, "trainer-socket": "/nowhere.sock"}, ClientFault.TRAINER_UNAVAILABLE),
    ]
    for change, node, fault in cases:
        reply = train({**task, **change}, node)
        assert reply.has_error(), fault
        assert flower.fault_of(reply) == fault.value
        assert reply.error.reason == fault.value
        assert SECRET not in str(reply)
    reply = ask(RecordDict(), flower.TRAIN, here)
    assert flower.fault_of(reply) == ClientFault.BAD_TASK.value
