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
``process``         ``resident`` if this process lives as long as the run, in simulations
``identity``        home of the enrolled device, whose key signs in a secure sum
``roster``          the cohort's public keys, for a secure sum; see privacy.secure_roster
``roster-digest``   ``sha256:...`` of that file, from somebody whom the device trusts; with it, no
                    update is sent but into a secure sum
``least-noise``     the least noise of the clients on a sum, over the clip, to take part; else any
==================  ==================================================================

A device with data of its own takes its randomness from a secret beside its ledger, never from the
seed in a task, which the server knows; only simulated clients use the seed. Whatever goes wrong,
the reply names a fault from a closed list, never the text of an exception, which could quote data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.errors import AggregationError, RecipeError
from aggregation.ring import RingError
from aggregation.train import Assignment
from aggregation.update import Update
from clients.data import DataError
from clients.errors import ClientError
from clients.identity import IdentityError
from clients.memory import ClientMemory, MissingTensors
from clients.node import (
    Unanswerable,
    client_of,
    data_of,
    finder_of,
    identity_of,
    insist,
    insist_on_sum,
    memory_of,
    resident,
    trainer_of,
)
from clients.outgoing import second_sketch
from clients.secure_desk import SecureRequest
from clients.training import ClientJob, Owner, PlanError, TrainingPlan
from privacy.budget import BudgetError, BudgetExceeded, LocalPrivacy
from privacy.errors import PrivacyError
from privacy.secure_session import SecureSumError
from protos import flower
from protos.errors import WireError
from protos.flower import ClientFault, MissingStart

log = logging.getLogger("airpeft.clients.client_app")
__all__ = ["app", "resident"]
app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train one round on this client's examples."""
    return _redacted(_train, message, context)


@app.train("sketch")  # type: ignore[untyped-decorator]
def sketch(message: Message, context: Context) -> Message:
    """Project what was just trained: the second half of a round in two passes."""
    return _redacted(_sketch, message, context)


@app.train("secure")  # type: ignore[untyped-decorator]
def secure(message: Message, context: Context) -> Message:
    """One step of the secure sum of what was just trained."""
    return _redacted(_secure, message, context)


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
    task = flower.train_task_from(message.content, finder_of(message, node))
    job = ClientJob(
        client=client_of(node),
        run=task.run,
        round=task.round,
        adapter=task.adapter,
        data=data_of(node, task.data_folder),
        plan=TrainingPlan.from_mapping(task.plan),
        privacy=LocalPrivacy.from_mapping(task.privacy) if task.privacy else None,
        seed=task.seed,
        assignment=Assignment.from_mapping(task.assignment),
        codec=task.codec,
        beside=task.beside,
        memory=memory_of(node, task.data_folder),
        secure=task.secure,
    )
    insist(node, task.secure)
    if task.secure:  # what cannot be summed must not be trained, and so spent, in vain
        identity_of(node, task.data_folder, task.seed).load(job.client)
    result = trainer_of(node, task.base, task.data_folder).train([job])[0]
    if isinstance(result, JobFailure):
        raise Unanswerable(_JOB_FAULTS[result.fault.value], result.detail)
    assert isinstance(result, Update)  # noqa: S101 - narrows the type
    if task.secure:
        return Message(flower.ready_record(_ready(result)), reply_to=message)
    return Message(flower.update_record(result), reply_to=message)


def _evaluate(message: Message, context: Context) -> Message:
    node = context.node_config
    task = flower.evaluate_task_from(message.content, finder_of(message, node))
    owner = Owner(
        client=client_of(node),
        run=task.run,
        round=task.round,
        assignment=Assignment.from_mapping(task.assignment),
        memory=memory_of(node, task.data_folder),
    )
    found = trainer_of(node, task.base, task.data_folder).evaluate(
        task.adapter,
        data_of(node, task.data_folder),
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
    insist_on_sum(node, task.secure)
    client, folder = client_of(node), memory_of(node, task.data_folder)
    # It takes what the client remembers and no model, so no trainer is asked.
    found = second_sketch(ClientMemory(folder, task.run, client), task.round, task.basis)
    if task.secure:
        values = np.concatenate([found[m].astype("<f8").ravel() for m in found]).tobytes()
        keep = SecureRequest(
            client=client,
            run=task.run,
            round=task.round,
            part=1,
            step="keep",
            blobs={"values": values},
            identity=identity_of(node, task.data_folder, 0),
        )
        trainer_of(node, task.base, task.data_folder).secure(keep)
        ready = flower.Ready(client=client, round=task.round)
        return Message(flower.ready_record(ready), reply_to=message)
    reply = flower.SketchReply(client=client, round=task.round, sketches=found)
    return Message(flower.sketch_reply_record(reply), reply_to=message)


def _secure(message: Message, context: Context) -> Message:
    node, task = context.node_config, flower.secure_task_from(message.content)
    request = SecureRequest(
        client=client_of(node),
        run=task.run,
        round=task.round,
        part=task.part,
        step=task.step,
        names=task.names,
        blobs=task.blobs,
        dropouts=task.dropouts,
        corrupt=task.corrupt,
        identity=identity_of(node, task.data_folder, task.seed),
    )
    reply = flower.SecureReply(
        client=request.client,
        round=task.round,
        part=task.part,
        step=task.step,
        blobs=trainer_of(node, task.base, task.data_folder).secure(request),
    )
    return Message(flower.secure_reply_record(reply), reply_to=message)


def _ready(update: Update) -> flower.Ready:
    return flower.Ready(
        client=update.client,
        round=update.round,
        start=update.start,
        privacy_event=update.privacy_event,
        metrics=update.metrics,
    )


def _identity(message: Message, context: Context) -> Message:
    node = context.node_config
    name = flower.Identity(client_of(node), int(node.get("max-rank", 0)))
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


_JOB_FAULTS = {
    "wrong-base": ClientFault.WRONG_BASE,
    "bad-data": ClientFault.BAD_DATA,
    "bad-plan": ClientFault.BAD_TASK,
    "budget-exceeded": ClientFault.BUDGET_EXCEEDED,
    "ledger": ClientFault.TRAINING_FAILED,
    "out-of-range": ClientFault.OUT_OF_RANGE,
    "secure-sum": ClientFault.SECURE_SUM,
    "training-failed": ClientFault.TRAINING_FAILED,
}


def _fault(error: Exception) -> ClientFault:
    from clients.base import BaseMismatch, BaseNotFound, BaseUnsupported
    from clients.trainer_wire import TrainerError

    if isinstance(error, Unanswerable):
        return error.fault
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], ClientFault], ...] = (
        ((MissingStart, MissingTensors), ClientFault.MISSING_TENSORS),
        (BudgetExceeded, ClientFault.BUDGET_EXCEEDED),
        ((WireError, PlanError, BudgetError, RecipeError), ClientFault.BAD_TASK),
        (DataError, ClientFault.BAD_DATA),
        ((BaseMismatch, BaseNotFound, BaseUnsupported), ClientFault.WRONG_BASE),
        (TrainerError, ClientFault.TRAINER_UNAVAILABLE),
        (RingError, ClientFault.OUT_OF_RANGE),
        ((SecureSumError, IdentityError), ClientFault.SECURE_SUM),
        ((ClientError, PrivacyError, AggregationError), ClientFault.TRAINING_FAILED),
    )
    for kind, fault in kinds:
        if isinstance(error, kind):
            return fault
    return ClientFault.TRAINING_FAILED
