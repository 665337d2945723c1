"""A federation without a model: clients that answer with NumPy, at once and always the same.

They keep their wits between rounds as real ones do: what they were handed, and what error feedback
left; :func:`forgetful` ones don't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter, FloatArray
from aggregation.assignment import Assignment
from aggregation.codecs import read_codec
from aggregation.parcel import send
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from aggregation.update import Update
from federation.rounds import RoundsConfig
from protos import flower

SPEC = AdapterSpec(
    "sha256:" + "0" * 64,
    (
        ModuleSpec("query", 12, 10, rank=2, alpha=4.0),
        ModuleSpec("value", 12, 10, rank=2, alpha=4.0),
    ),
    (TensorSpec("classifier.weight", (2, 10)),),
)
START = Adapter(
    SPEC,
    {
        key: np.random.default_rng(i).normal(size=shape)
        for i, (key, shape) in enumerate(SPEC.shapes().items())
    },
)
Behaviour = Callable[[flower.TrainTask, str], "Update | flower.ClientFault"]


def honest(task: flower.TrainTask, client: str) -> Update:
    """Moves every tensor by an amount that depends on client, round and seed alone."""
    rng = np.random.default_rng([int(client[-5:]), task.round, task.seed])
    moved = {k: v + 0.1 * rng.normal(size=v.shape) for k, v in task.adapter}
    return Update(
        client=client,
        round=task.round,
        start=task.adapter.digest,
        adapter=Adapter(task.adapter.spec, moved),
        weight=float(1 + int(client[-5:])),
        metrics={"seconds": 0.5},
    )


def lying(**changes: object) -> Behaviour:
    """An honest update with some fields replaced."""
    return lambda task, client: replace(honest(task, client), **changes)  # type: ignore[arg-type]


def toy_app(
    behave: Behaviour = honest,
    *,
    forgetful: bool = False,
    max_rank: Mapping[str, int] = MappingProxyType({}),
) -> ClientApp:
    """A ClientApp whose clients behave so.

    Args:
        behave: what a client answers to a task.
        forgetful: whether a client loses, after each round, what it was handed in it.
        max_rank: the largest rank that a client's device can train, by its name.
    """
    app = ClientApp()
    held: dict[str, dict[str, Adapter]] = {}
    errors: dict[str, FloatArray | None] = {}

    def name(context: Context) -> str:
        return flower.client_name(int(context.node_config["partition-id"]))

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        who = flower.Identity(name(context), max_rank.get(name(context), 0))
        return Message(flower.identity_record(who), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = name(context)
        known = held.setdefault(client, {})
        try:
            task = flower.train_task_from(message.content, known.get)
        except flower.MissingStart:
            return flower.fault_reply(flower.ClientFault.MISSING_TENSORS, message)
        outcome = behave(task, client)
        if isinstance(outcome, flower.ClientFault):
            return flower.fault_reply(outcome, message)
        if not forgetful:
            known[task.adapter.digest] = task.adapter
        assignment = Assignment.from_mapping(task.assignment)
        if task.assignment or task.codec != "float32":
            codec = read_codec(task.codec)
            before = errors.get(client)
            outcome, errors[client] = send(outcome, task.adapter, assignment, codec, before)
        return Message(flower.update_record(outcome), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = name(context)
        known = held.setdefault(client, {})
        task = flower.evaluate_task_from(message.content, known.get)
        share = 1 / (2 + int(client[-5:]))
        result = flower.EvaluateResult(
            client=client,
            round=task.round,
            examples=10 + int(client[-5:]),
            accuracy=share,
            loss=1 - share,
        )
        return Message(flower.evaluate_result_record(result), reply_to=message)

    return app


def settings(**changes: object) -> RoundsConfig:
    """A run of three rounds."""
    fields = {"run": "toy", "rounds": 3, "base": "none", "clients": 5, "seed": 11, **changes}
    return RoundsConfig(**fields)  # type: ignore[arg-type]
