"""The Flower ClientApp: a thin shim between Flower's messages and a resident trainer.

It holds no model and no state. Where the trainer is, and where the data are, it reads from the
node's own configuration:

==================  ==================================================================
node_config         means
==================  ==================================================================
``trainer-socket``  the socket of a ``clients.trainer_process``; else it trains in here
``data``            the device's own examples; else the simulation's, from the task
``text``, ``label`` names of the data's columns; default ``text`` and ``label``
``client``          the client's stable name; else it is made from ``partition-id``
``base``            the device's base model; else the one that the task names
``ledger``          the device's ledger; else ``ledger.sqlite`` beside the data
``memory``          folder of what it keeps between rounds; else ``memory`` beside the ledger
``max-rank``        the largest LoRA rank that the device can train; default any
``threads``         of the trainer in here; default 1
==================  ==================================================================

A device with data of its own takes its randomness from a secret beside its ledger, never from the
seed in a task, which the server knows; only simulated clients use the seed. Whatever goes wrong,
the reply names a fault from a closed list, never the text of an exception, which could quote data.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter
from aggregation.errors import AggregationError, RecipeError
from aggregation.train import Assignment
from aggregation.update import Update
from clients.data import DataError, DataSource
from clients.errors import ClientError
from clients.memory import ClientMemory, MissingTensors
from clients.outgoing import second_sketch
from clients.training import ClientJob, Owner, PlanError, TrainingPlan
from privacy.budget import BudgetError, LocalPrivacy
from privacy.errors import PrivacyError
from protos import flower
from protos.errors import WireError
from protos.flower import ClientFault, MissingStart
from protos.tasks import client_memory

if TYPE_CHECKING:
    from clients.trainer import Trainer

log = logging.getLogger("airpeft.clients.client_app")
app = ClientApp()

_trainers: dict[tuple[str, ...], Any] = {}
_lock = threading.Lock()


class Unanswerable(ClientError):  # noqa: N818 - says what the request is
    """A request that this client answers with a fault."""

    def __init__(self, fault: ClientFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train one round on this client's examples."""
    return _redacted(_train, message, context)


@app.train("sketch")  # type: ignore[untyped-decorator]
def sketch(message: Message, context: Context) -> Message:
    """Project what was just trained: the second half of a round in two passes."""
    return _redacted(_sketch, message, context)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Measure an adapter on this client's examples."""
    return _redacted(_evaluate, message, context)


@app.query("identity")  # type: ignore[untyped-decorator]
def identity(message: Message, context: Context) -> Message:
    """Say the client's stable name."""
    return _redacted(_identity, message, context)


def _train(message: Message, context: Context) -> Message:
    from clients.faults import JobFailure

    node = context.node_config
    task = flower.train_task_from(message.content, _finder(message, node))
    job = ClientJob(
        client=_client(node),
        run=task.run,
        round=task.round,
        adapter=task.adapter,
        data=_data(node, task.data_folder),
        plan=TrainingPlan.from_mapping(task.plan),
        privacy=LocalPrivacy.from_mapping(task.privacy) if task.privacy else None,
        seed=task.seed,
        assignment=Assignment.from_mapping(task.assignment),
        codec=task.codec,
        beside=task.beside,
        memory=_memory(node, task.data_folder),
    )
    result = _trainer(node, task.base, task.data_folder).train([job])[0]
    if isinstance(result, JobFailure):
        raise Unanswerable(_JOB_FAULTS[result.fault.value], result.detail)
    assert isinstance(result, Update)  # noqa: S101 - narrows the type
    return Message(flower.update_record(result), reply_to=message)


def _evaluate(message: Message, context: Context) -> Message:
    node = context.node_config
    task = flower.evaluate_task_from(message.content, _finder(message, node))
    owner = Owner(
        client=_client(node),
        run=task.run,
        round=task.round,
        assignment=Assignment.from_mapping(task.assignment),
        memory=_memory(node, task.data_folder),
    )
    found = _trainer(node, task.base, task.data_folder).evaluate(
        task.adapter,
        _data(node, task.data_folder),
        max_length=TrainingPlan.from_mapping(task.plan).max_length,
        beside=task.beside,
        owner=owner,
    )
    result = flower.EvaluateResult(
        client=owner.client,
        round=task.round,
        examples=found.examples,
        accuracy=found.accuracy,
        loss=found.loss,
    )
    return Message(flower.evaluate_result_record(result), reply_to=message)


def _sketch(message: Message, context: Context) -> Message:
    node, task = context.node_config, flower.sketch_task_from(message.content)
    client, folder = _client(node), _memory(node, task.data_folder)
    # It takes what the client remembers and no model, so no trainer is asked.
    found = second_sketch(ClientMemory(folder, task.run, client), task.round, task.basis)
    reply = flower.SketchReply(client=client, round=task.round, sketches=found)
    return Message(flower.sketch_reply_record(reply), reply_to=message)


def _identity(message: Message, context: Context) -> Message:
    node = context.node_config
    name = flower.Identity(_client(node), int(node.get("max-rank", 0)))
    return Message(flower.identity_record(name), reply_to=message)


def _redacted(
    answer: Callable[[Message, Context], Message], message: Message, context: Context
) -> Message:
    try:
        return answer(message, context)
    except Exception as error:  # Flower would send the text of anything that escapes
        fault = _fault(error)
        log.warning("answered %s with %s: %s", message.metadata.message_type, fault, error)
        return flower.fault_reply(fault, message)


def _client(node: Mapping[str, Any]) -> str:
    if "client" in node:
        return str(node["client"])
    if "partition-id" not in node:
        raise Unanswerable(
            ClientFault.BAD_TASK, "node_config has neither 'client' nor 'partition-id'"
        )
    return flower.client_name(int(node["partition-id"]))


def _data(node: Mapping[str, Any], data_folder: str) -> DataSource:
    columns = str(node.get("text", "text")), str(node.get("label", "label"))
    if "data" in node:
        return DataSource(Path(str(node["data"])), *columns)
    if not data_folder or "partition-id" not in node:
        raise Unanswerable(
            ClientFault.NO_DATA, "node_config has no 'data', and the task names no data folder"
        )
    path = flower.client_data(data_folder, int(node["partition-id"]))
    if not path.is_file():
        raise Unanswerable(ClientFault.NO_DATA, f"{path} is missing")
    return DataSource(path, *columns)


def _memory(node: Mapping[str, Any], data_folder: str) -> Path:
    if "memory" in node:
        return Path(str(node["memory"]))
    if "ledger" in node or "data" in node:
        return _ledger(node, data_folder).with_name("memory")
    return client_memory(data_folder)


def _finder(message: Message, node: Mapping[str, Any]) -> Callable[[str], Adapter | None]:
    """Finds an adapter that this client was handed before, by its digest."""
    fields = message.content.config_records.get(flower.TASK, {})
    run, data_folder = str(fields.get("run", "")), str(fields.get("data-folder", ""))
    return lambda digest: ClientMemory(_memory(node, data_folder), run, _client(node)).find(digest)


def _ledger(node: Mapping[str, Any], data_folder: str) -> Path:
    if "ledger" in node:
        return Path(str(node["ledger"]))
    if "data" in node:
        return Path(str(node["data"])).parent / "ledger.sqlite"
    return flower.client_ledger(data_folder)


def _trainer(node: Mapping[str, Any], base: str, data_folder: str) -> Trainer:
    if "trainer-socket" in node:
        from clients.trainer_process import TrainerClient

        return TrainerClient(str(node["trainer-socket"]))
    name, threads = str(node.get("base", base)), int(node.get("threads", 1))
    return resident(name, _ledger(node, data_folder), "data" in node, threads)


def resident(name: str, ledger: Path, own: bool, threads: int) -> Trainer:
    """The trainer of this process for a base and a ledger; the model is loaded once."""
    from clients.base import KNOWN_BASES, find_base
    from clients.trainer import ResidentTrainer
    from privacy.ledger import Ledger
    from privacy.randomness import device_key

    if own and name not in KNOWN_BASES and not Path(name).is_dir():
        raise Unanswerable(ClientFault.WRONG_BASE, f"the base {name!r} is not on this device")
    key = (name, str(ledger.absolute()), str(own), str(threads))
    with _lock:
        if key not in _trainers:
            secret = device_key(ledger.with_name(ledger.name + ".key")) if own else None
            _trainers[key] = ResidentTrainer(
                find_base(name), Ledger(ledger), threads, device_key=secret
            )
        trainer: Trainer = _trainers[key]
        return trainer


_JOB_FAULTS = {
    "wrong-base": ClientFault.WRONG_BASE,
    "bad-data": ClientFault.BAD_DATA,
    "bad-plan": ClientFault.BAD_TASK,
    "budget-exceeded": ClientFault.BUDGET_EXCEEDED,
    "ledger": ClientFault.TRAINING_FAILED,
    "training-failed": ClientFault.TRAINING_FAILED,
}


def _fault(error: Exception) -> ClientFault:
    from clients.base import BaseMismatch, BaseNotFound, BaseUnsupported
    from clients.trainer_wire import TrainerError

    if isinstance(error, Unanswerable):
        return error.fault
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], ClientFault], ...] = (
        ((MissingStart, MissingTensors), ClientFault.MISSING_TENSORS),
        ((WireError, PlanError, BudgetError, RecipeError), ClientFault.BAD_TASK),
        (DataError, ClientFault.BAD_DATA),
        ((BaseMismatch, BaseNotFound, BaseUnsupported), ClientFault.WRONG_BASE),
        (TrainerError, ClientFault.TRAINER_UNAVAILABLE),
        ((ClientError, PrivacyError, AggregationError), ClientFault.TRAINING_FAILED),
    )
    for kind, fault in kinds:
        if isinstance(error, kind):
            return fault
    return ClientFault.TRAINING_FAILED
