"""A federation without a model whose clients keep their updates for a secure sum.

Everything but the training is real: the messages, the desk in which updates wait, the identities
and the roster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codecs import read_codec
from aggregation.errors import AggregationError
from aggregation.parcel import send
from aggregation.sketches import first_pass, second_pass
from aggregation.update import Update
from clients.data import Examples
from clients.secure_desk import SecureDesk, SecureRequest
from clients.secure_identity import SecureIdentity
from clients.training import ClientJob, TrainingPlan
from federation.rounds import RoundsConfig
from privacy.errors import PrivacyError
from privacy.secure_roster import Roster, public_bytes, seeded_identity
from protos import flower
from tests.simulations.toy import Behaviour, honest, settings

NOBODY = Examples((), (), ())
Dies = Callable[[str, str, int], bool]


def write_roster(folder: Path, count: int, seed: int) -> Path:
    """The roster of so many clients; gives the data folder that leads to it."""
    names = [flower.client_name(number) for number in range(count)]
    keys = {name: public_bytes(seeded_identity(seed, name)) for name in names}
    data = folder / "partitions"
    flower.client_roster(str(data)).write_bytes(Roster(keys).to_bytes())
    return data


def secure_settings(folder: Path, clients: int = 12, **changes: object) -> RoundsConfig:
    """Rounds with a secure sum, and the roster for them in a folder."""
    pieces = {"private": "secure-sum(clip=1, max_weight=64)", **dict(changes.pop("pieces", {}))}  # type: ignore[call-overload]
    data = write_roster(folder, clients, 11)
    fields = {"recipe": "fedit", "clients": clients, "rounds": 1, "pieces": pieces}
    return settings(**{**fields, "data_folder": str(data), **changes})


def secure_app(
    behave: Behaviour = honest,
    *,
    dies: Dies = lambda client, step, part: False,
    desk: SecureDesk | None = None,
    seen: dict[tuple[str, str, int], Mapping[str, bytes]] | None = None,
    trained: dict[str, Update] | None = None,
    roster: str = "",
) -> ClientApp:
    """A ClientApp whose clients keep what they trained.

    Args:
        behave: what a client makes of a task.
        dies: whether a client's process dies when it is asked for a step of a part of a round.
        desk: where updates wait.
        seen: filled with what each client answered, by (client, step, part).
        trained: filled with each client's last update.
        roster: of devices, to which the server names no folder; else that of the task's folder.
    """
    app = ClientApp()
    there = desk or SecureDesk(once=False)
    held: dict[str, Adapter] = {}
    kept: dict[str, tuple[Adapter, Adapter]] = {}

    def name(context: Context) -> str:
        return flower.client_name(int(context.node_config["partition-id"]))

    def identity_of(data_folder: str) -> SecureIdentity:
        return SecureIdentity(roster=roster or str(flower.client_roster(data_folder)), seed=11)

    def ask(request: SecureRequest) -> dict[str, bytes] | None:
        try:
            found = there.step(request)
        except (PrivacyError, AggregationError):
            return None
        if seen is not None:
            seen[request.client, request.step, request.part] = found
        return found

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return Message(flower.identity_record(flower.Identity(name(context))), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = name(context)
        task = flower.train_task_from(message.content, held.get)
        if dies(client, "train", 0):
            raise RuntimeError("killed")
        held[task.adapter.digest] = task.adapter
        asked = Assignment.from_mapping(task.assignment)
        made = behave(task, client)
        assert isinstance(made, Update)
        kept[client] = made.adapter, task.adapter
        sketches = (
            first_pass(made.adapter, task.adapter, asked.sketch, asked.seed, task.round)
            if asked.sketch
            else {}
        )
        made = Update(client, task.round, made.start, made.adapter, made.weight, sketches=sketches)
        made, _ = send(made, task.adapter, asked, read_codec(task.codec))
        if trained is not None:
            trained[client] = made
        if not task.secure:
            return Message(flower.update_record(made), reply_to=message)
        job = ClientJob(
            client=client,
            run=task.run,
            round=task.round,
            adapter=task.adapter,
            data=NOBODY,
            plan=TrainingPlan(),
            assignment=asked,
            secure=task.secure,
        )
        try:
            there.keep(job, made)
        except AggregationError:
            return flower.fault_reply(flower.ClientFault.OUT_OF_RANGE, message)
        ready = flower.Ready(client=client, round=task.round, start=made.start)
        return Message(flower.ready_record(ready), reply_to=message)

    @app.train("sketch")
    def sketch(message: Message, context: Context) -> Message:
        client, task = name(context), flower.sketch_task_from(message.content)
        if dies(client, "sketch", 1):
            raise RuntimeError("killed")
        found = second_pass(*kept[client], task.basis)
        if not task.secure:
            reply = flower.SketchReply(client=client, round=task.round, sketches=found)
            return Message(flower.sketch_reply_record(reply), reply_to=message)
        values = np.concatenate([found[m].astype("<f8").ravel() for m in found]).tobytes()
        request = SecureRequest(
            client=client,
            run=task.run,
            round=task.round,
            part=1,
            step="keep",
            blobs={"values": values},
            identity=identity_of(task.data_folder),
        )
        assert ask(request) == {}
        ready = flower.Ready(client=client, round=task.round)
        return Message(flower.ready_record(ready), reply_to=message)

    @app.train("secure")
    def secure(message: Message, context: Context) -> Message:
        client, task = name(context), flower.secure_task_from(message.content)
        if dies(client, task.step, task.part):
            raise RuntimeError("killed")
        found = ask(
            SecureRequest(
                client=client,
                run=task.run,
                round=task.round,
                part=task.part,
                step=task.step,
                names=task.names,
                blobs=task.blobs,
                dropouts=task.dropouts,
                corrupt=task.corrupt,
                identity=identity_of(task.data_folder),
            )
        )
        if found is None:
            return flower.fault_reply(flower.ClientFault.SECURE_SUM, message)
        reply = flower.SecureReply(
            client=client, round=task.round, part=task.part, step=task.step, blobs=found
        )
        return Message(flower.secure_reply_record(reply), reply_to=message)

    return app
