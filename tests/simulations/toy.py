"""A federation without a model: clients that answer with NumPy, at once and always the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter
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


def toy_app(behave: Behaviour = honest) -> ClientApp:
    """A ClientApp whose clients behave so."""
    app = ClientApp()

    def name(context: Context) -> str:
        return flower.client_name(int(context.node_config["partition-id"]))

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return Message(flower.identity_record(flower.Identity(name(context))), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        outcome = behave(flower.train_task_from(message.content), name(context))
        if isinstance(outcome, flower.ClientFault):
            return flower.fault_reply(outcome, message)
        return Message(flower.update_record(outcome), reply_to=message)

    return app


def settings(**changes: object) -> RoundsConfig:
    """A run of three rounds."""
    fields = {"run": "toy", "rounds": 3, "base": "none", "clients": 5, "seed": 11, **changes}
    return RoundsConfig(**fields)  # type: ignore[arg-type]
