"""FedASK over a grid: two round trips, and the exact mean of those who took part in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.codecs import read_codec
from aggregation.parcel import send
from aggregation.recipe import Recipe
from aggregation.sketches import first_pass, second_pass
from aggregation.sketching import Sketch
from federation.rounds import Round
from federation.server_app import run_training
from federation.strategy import TrainingResult
from protos import flower
from simulations.grid import LocalGrid
from tests.aggregation.adapters import products, relative
from tests.simulations.toy import START, honest, settings

WIDE = {"recipe": "fedask", "pieces": {"reduce": "sketch(width=9)", "refactor": "svd"}}
Second = Callable[[flower.SketchReply], "flower.SketchReply | flower.ClientFault"]


def sketching_app(
    second: Callable[[str], Second | None] = lambda _: None,
    trained: dict[tuple[str, int], Adapter] | None = None,
) -> ClientApp:
    """Clients that send sketches; ``second`` says who answers the second pass otherwise."""
    app = ClientApp()
    kept: dict[tuple[str, int], tuple[Adapter, Adapter]] = {}
    held: dict[str, Adapter] = {}

    def name(context: Context) -> str:
        return flower.client_name(int(context.node_config["partition-id"]))

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return Message(flower.identity_record(flower.Identity(name(context))), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = name(context)
        task = flower.train_task_from(message.content, held.get)
        held[task.adapter.digest] = task.adapter
        asked = Assignment.from_mapping(task.assignment)
        update = honest(task, client)
        kept[client, task.round] = update.adapter, task.adapter
        if trained is not None:
            trained[client, task.round] = update.adapter
        sketches = first_pass(update.adapter, task.adapter, asked.sketch, asked.seed, task.round)
        update, _ = send(update, task.adapter, asked, read_codec(task.codec))
        return Message(flower.update_record(replace(update, sketches=sketches)), reply_to=message)

    @app.train("sketch")
    def sketch(message: Message, context: Context) -> Message:
        client = name(context)
        task = flower.sketch_task_from(message.content)
        adapter, start = kept.pop((client, task.round))
        reply = flower.SketchReply(
            client=client, round=task.round, sketches=second_pass(adapter, start, task.basis)
        )
        change = second(client)
        outcome = change(reply) if change else reply
        if isinstance(outcome, flower.ClientFault):
            return flower.fault_reply(outcome, message)
        return Message(flower.sketch_reply_record(outcome), reply_to=message)

    return app


def run(app: ClientApp, **changes: object) -> TrainingResult:
    config = settings(**{**WIDE, "rounds": 2, **changes})
    with LocalGrid(app, config.clients) as grid:
        return run_training(grid, config, initial=START)


def expected(
    result: TrainingResult, trained: dict[tuple[str, int], Adapter], record: Round, before: Adapter
) -> dict[str, np.ndarray]:
    total = sum(record.weights.values())
    dense = products(before)
    for client, weight in record.weights.items():
        after = products(trained[client, record.number])
        for name, old in products(before).items():
            dense[name] = dense[name] + weight / total * (after[name] - old)
    return dense


def test_two_round_trips_give_the_exact_mean_and_all_bytes_are_counted() -> None:
    trained: dict[tuple[str, int], Adapter] = {}
    result = run(sketching_app(trained=trained), rounds=1)
    record = result.rounds[1]
    assert len(record.used) == 5
    for name, matrix in expected(result, trained, record, START).items():
        assert relative(result.state.exact(name).dense(), matrix) < 1e-5
    columns = Recipe("x", reduce=Sketch(width=9)).assignment(1, START.spec).sketch
    # Modules are 10 x 12, so that 9 + 4 columns are cut to 10, and all of them are the basis.
    assert columns == 13
    head = 4 * 20
    assert record.bytes_up == 5 * (head + 2 * 4 * (10 * 10 + 12 * 10))
    assert record.bytes_down == 5 * (START.nbytes + 2 * 4 * 10 * 10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: flower.ClientFault.TRAINING_FAILED, "training-failed"),
        (lambda reply: replace(reply, client="client-00000"), "wrong-client"),
        (lambda reply: replace(reply, round=9), "wrong-round"),
        (lambda reply: replace(reply, sketches={}), "malformed"),
        (
            lambda reply: replace(
                reply, sketches={k: v * np.nan for k, v in reply.sketches.items()}
            ),
            "not-finite",
        ),
        (
            lambda reply: replace(reply, sketches={k: v[1:] for k, v in reply.sketches.items()}),
            "wrong-shape",
        ),
        (lambda reply: 1 / 0, "flower-2"),
    ],
)
def test_who_fails_between_the_passes_is_left_out_with_the_reason(
    change: Second, reason: str
) -> None:
    trained: dict[tuple[str, int], Adapter] = {}
    app = sketching_app(lambda client: change if client == "client-00003" else None, trained)
    result = run(app, rounds=1)
    record = result.rounds[1]
    assert record.refused == {"client-00003": reason}
    assert set(record.weights) == set(record.used) == {f"client-0000{k}" for k in (0, 1, 2, 4)}
    for name, matrix in expected(result, trained, record, START).items():
        assert relative(result.state.exact(name).dense(), matrix) < 1e-5


def test_too_few_second_answers_change_nothing_and_the_run_goes_on() -> None:
    failed = lambda reply: flower.ClientFault.TRAINING_FAILED  # noqa: E731
    app = sketching_app(lambda client: failed if client != "client-00003" else None)
    result = run(app, min_updates=2)
    assert result.adapter.digest == START.digest
    assert [len(r.used) for r in result.rounds] == [0, 1, 1]


def test_the_named_recipe_runs_at_its_own_width() -> None:
    result = run(sketching_app(), pieces={})
    assert result.rounds[-1].adapter_out != START.digest
    assert all(0 < r.aggregation_error < 1 for r in result.rounds[1:])
