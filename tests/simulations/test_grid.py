from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federation.server_app import run_training
from protos import flower
from simulations.grid import FIRST_NODE, GridError, InProcess, LocalGrid
from tests.simulations.fair_grid import FairGrid
from tests.simulations.toy import START, honest, settings, toy_app
from tests.waiting import until


class Counting(InProcess):
    """A worker that counts what happens to it."""

    def __init__(self) -> None:
        self.abandoned = 0

    def abandon(self) -> None:
        self.abandoned += 1


def digest_of(app: ClientApp, workers: int, clients: int = 7) -> str:
    with LocalGrid(app, clients, workers=[InProcess() for _ in range(workers)]) as grid:
        return run_training(grid, settings(clients=clients), initial=START).adapter.digest


def test_any_number_of_lanes_gives_the_same_adapter_to_the_last_bit() -> None:
    turn = threading.Lock()
    slow = threading.Event()

    def uneven(task: flower.TrainTask, client: str) -> flower.Update | flower.ClientFault:
        # Later clients finish first: even lanes wait for an odd one to have gone by.
        with turn:
            if int(client[-5:]) % 2:
                slow.set()
        if int(client[-5:]) % 2 == 0:
            slow.wait(0.02)
        return honest(task, client)

    one = digest_of(toy_app(), 0)
    assert one == digest_of(toy_app(), 1) == digest_of(toy_app(uneven), 2)
    assert one == digest_of(toy_app(uneven), 5)


def test_nothing_is_shared_between_the_two_sides() -> None:
    seen: list[Message] = []
    app = ClientApp()

    @app.query("identity")
    def keep(message: Message, context: Context) -> Message:
        seen.append(message)
        message.content["added"] = ArrayRecord()
        return Message(message.content, reply_to=message)

    with LocalGrid(app, 1) as grid:
        content = RecordDict()
        request = Message(content, dst_node_id=FIRST_NODE, message_type=flower.IDENTITY)
        (reply,) = grid.send_and_receive([request])
        assert "added" not in content
        assert reply.content is not seen[0].content
        assert reply.metadata.reply_to_message_id == request.metadata.message_id
        assert seen[0].metadata.message_id == request.metadata.message_id


def test_an_exception_becomes_an_error_without_its_text() -> None:
    app = ClientApp()

    @app.query("identity")
    def fail(message: Message, context: Context) -> Message:
        raise ValueError("the text of a private sentence")

    with LocalGrid(app, 1) as grid:
        (reply,) = grid.send_and_receive(
            [Message(RecordDict(), dst_node_id=FIRST_NODE, message_type=flower.IDENTITY)]
        )
    assert reply.error.reason == "ValueError"
    assert flower.fault_of(reply) == "flower-2"


def test_a_client_that_never_returns_is_left_behind_and_its_lane_replaced() -> None:
    release, hung = threading.Event(), set[str]()

    def stuck(task: flower.TrainTask, client: str) -> flower.Update:
        if client == "client-00002":
            hung.add(client)
            release.wait(240)
        return honest(task, client)

    worker = Counting()
    with FairGrid(toy_app(stuck), 3, hung=hung, workers=[worker]) as grid:
        result = run_training(grid, settings(clients=3, rounds=2), initial=START)
        release.set()
    assert [r.used for r in result.rounds[1:]] == [("client-00000", "client-00001")] * 2
    assert [r.refused for r in result.rounds[1:]] == [{"client-00002": "late"}] * 2
    assert worker.abandoned == 2


def test_push_and_pull_work_too() -> None:
    with LocalGrid(toy_app(), 3) as grid:
        ids = list(
            grid.push_messages(
                Message(RecordDict(), dst_node_id=node, message_type=flower.IDENTITY)
                for node in grid.get_node_ids()
            )
        )
        replies: list[Message] = []

        def all_there() -> bool:
            replies.extend(grid.pull_messages(ids))
            return len(replies) == 3

        until(all_there, what="three replies")
        assert list(grid.pull_messages(ids)) == []


def test_unknown_nodes_and_empty_federations_are_refused() -> None:
    with pytest.raises(GridError, match="clients=0"):
        LocalGrid(toy_app(), 0)
    with LocalGrid(toy_app(), 1) as grid:
        message = Message(RecordDict(), dst_node_id=5, message_type=flower.IDENTITY)
        with pytest.raises(GridError, match="no node 5"):
            list(grid.send_and_receive([message]))


def test_memory_does_not_grow_with_the_number_of_clients(tmp_path: Path) -> None:
    def peak(clients: int) -> int:
        with LocalGrid(toy_app(forgetful=True), clients) as grid:
            tracemalloc.start()
            config = settings(clients=clients, rounds=1, recipe="fedit")
            run_training(grid, config, initial=BIG)
            _, top = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return top

    from aggregation.adapter import Adapter
    from aggregation.spec import AdapterSpec, TensorSpec

    spec = AdapterSpec("sha256:" + "0" * 64, others=(TensorSpec("head.weight", (100, 500)),))
    BIG = Adapter.zeros(spec)  # 200 kB
    peak(2)  # imports and caches
    few, many = peak(10), peak(100)
    assert many - few < 30 * 200_000  # one adapter for each further client would be 90
