"""The ClientApp through Flower's own objects; no reply carries the text of an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from aggregation import sketches
from aggregation.init import initial_adapter
from aggregation.train import Assignment
from clients import client_app
from clients.base import BaseRef, find_base
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


ONLY_B = Assignment(trains="B", sends="B")


def test_the_next_task_leaves_out_what_the_client_still_has(
    task: dict[str, Any], data_file: Path
) -> None:
    here = {"partition-id": 3}
    task = {**task, "assignment": ONLY_B.to_mapping(), "codec": "int8"}
    first = task["adapter"]
    found = flower.update_from(train(task, here).content, {first.digest: first}.get)
    assert found.parcel is not None
    assert found.parcel.codec == "int8"
    second = found.adapter  # A as before, B new
    whole = flower.train_task_record(flower.TrainTask(**{**task, "round": 2, "adapter": second}))
    less = flower.train_task_record(
        flower.TrainTask(**{**task, "round": 2, "adapter": second}), held=first
    )
    assert flower.record_bytes(less) < flower.record_bytes(whole)
    starts = {second.digest: second}.get
    one = flower.update_from(ask(less, flower.TRAIN, here).content, starts)
    other = flower.update_from(ask(whole, flower.TRAIN, here).content, starts)
    assert one.adapter.digest == other.adapter.digest
    assert (data_file.parent.parent / "memory" / "r" / "client-00003").is_dir()
    # Another client of the same machine has not got it, and says so.
    (data_file.parent / "client-00004.jsonl").write_bytes(data_file.read_bytes())
    reply = ask(less, flower.TRAIN, {"partition-id": 4})
    assert reply.has_error()
    assert reply.error.reason == ClientFault.MISSING_TENSORS.value


def test_the_second_pass_answers_with_what_the_first_has_trained(
    task: dict[str, Any], tmp_path: Path, data_file: Path
) -> None:
    node = {"partition-id": 3, "memory": str(tmp_path / "elsewhere")}
    assignment = Assignment(sketch=5, seed=2)
    task = {**task, "assignment": assignment.to_mapping(), "privacy": None}
    start = task["adapter"]
    first = flower.update_from(train(task, node).content, {start.digest: start}.get)
    basis = {k: np.linalg.qr(v)[0].astype(np.float32) for k, v in first.sketches.items()}
    asked = flower.SketchTask(run="r", round=1, basis=basis)
    reply = ask(flower.sketch_task_record(asked), flower.SKETCH, node)
    second = flower.sketch_reply_from(reply.content)
    assert (second.client, second.round) == ("client-00003", 1)
    job = ClientJob(
        client="client-00003", run="r", round=1, adapter=start, data=DataSource(data_file),
        plan=PLAN, seed=3,
    )  # fmt: skip
    (trained,) = ResidentTrainer(find_base(Path(task["base"])), threads=1).train([job])
    expected = sketches.second_pass(trained.adapter, start, basis)  # type: ignore[union-attr]
    assert all(np.array_equal(second.sketches[k], expected[k]) for k in expected)
    for number, who in ((2, 3), (1, 4)):
        late = flower.sketch_task_record(flower.SketchTask(run="r", round=number, basis=basis))
        reply = ask(late, flower.SKETCH, {**node, "partition-id": who})
        assert reply.error.reason == ClientFault.MISSING_TENSORS.value


def test_a_client_measures_what_it_has_kept_on_the_rows_it_held_out(task: dict[str, Any]) -> None:
    here, assignment = {"partition-id": 3}, Assignment(sends="A", keeps="B", holdout=0.3)
    start, said = task["adapter"], assignment.to_mapping()
    task = {**task, "assignment": said, "privacy": None, "plan": {**PLAN.to_mapping(), "steps": 30}}
    update = flower.update_from(train(task, here).content, {start.digest: start}.get)
    values = {k: task[k] for k in ("run", "round", "plan", "data_folder", "base", "assignment")}

    def measured(**change: Any) -> flower.EvaluateResult:
        asked = flower.EvaluateTask(**{**values, "adapter": update.adapter, **change})
        reply = ask(flower.evaluate_task_record(asked), flower.EVALUATE, here)
        return flower.evaluate_result_from(reply.content)

    mine = measured()
    assert mine.examples + update.weight == 60
    assert 0 < mine.examples < 30
    assert mine.loss != measured(run="another").loss  # there it has kept nothing
    assert measured(assignment={}).examples == 60


def test_a_device_keeps_its_memory_beside_its_ledger_and_says_its_rank(
    task: dict[str, Any], base: BaseRef, data_file: Path, tmp_path: Path
) -> None:
    node = {
        "client": "kitchen",
        "data": str(data_file),
        "base": str(base.path),
        "ledger": str(tmp_path / "own" / "ledger.sqlite"),
        "max-rank": 4,
    }
    train({**task, "assignment": ONLY_B.to_mapping()}, node)
    assert (tmp_path / "own" / "memory" / "r" / "kitchen" / "000001.safetensors").is_file()
    reply = ask(RecordDict(), flower.IDENTITY, node)
    assert flower.identity_from(reply.content) == flower.Identity("kitchen", 4)


SECRET = "my mother's illness"


def test_no_fault_carries_the_text_of_an_exception(
    task: dict[str, Any], base: BaseRef, data_file: Path, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", seed=1)
    foreign = initial_adapter(adapter_spec(other, LABELS, rank=2, alpha=4.0), seed=1)
    private = data_file.parent / "client-00004.jsonl"
    private.write_text(f'{{"text": "x", "label": "{SECRET}"}}\n')
    here = {"partition-id": 3}
    core = Assignment(trains="core", sends="core").to_mapping()  # the adapter is off its basis
    cases: list[tuple[dict[str, Any], dict[str, Any], ClientFault]] = [
        ({}, {"partition-id": 4}, ClientFault.BAD_DATA),
        ({}, {"partition-id": 5}, ClientFault.NO_DATA),
        ({"data_folder": ""}, here, ClientFault.NO_DATA),
        ({}, {}, ClientFault.BAD_TASK),
        ({"adapter": foreign}, here, ClientFault.WRONG_BASE),
        ({"base": "no-such-base"}, here, ClientFault.WRONG_BASE),
        ({"plan": {"epochs": -1}}, here, ClientFault.BAD_TASK),
        ({"assignment": core}, here, ClientFault.BAD_TASK),
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
