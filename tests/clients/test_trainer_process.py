"""The trainer as a process: the same bits, kills that lose nothing, and no pickles."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.train import Assignment
from aggregation.update import Update
from clients.base import BaseMismatch, BaseRef
from clients.client_app import _fault
from clients.data import DataError, DataSource, Examples
from clients.faults import JobFailure, JobFault
from clients.model import adapter_spec
from clients.trainer import ResidentTrainer
from clients.trainer_process import TrainerClient, listen, parsed, serve
from clients.trainer_wire import TrainerError, receive
from clients.training import ClientJob, Owner, TrainingPlan
from privacy.budget import BudgetExceeded, LocalPrivacy
from privacy.calibration import epsilon
from privacy.ledger import Ledger, Terms
from protos.flower import ClientFault
from tests.device.tiny import LABELS, make_base
from tests.waiting import until

PLAN = TrainingPlan(sample_rate=0.25, steps=4, learning_rate=0.02)
PRIVATE = LocalPrivacy(epsilon=8.0, delta=1e-3, rounds=2)


def job(base: BaseRef, data: Examples | DataSource, **change: object) -> ClientJob:
    start = initial_adapter(adapter_spec(base, LABELS, rank=2, alpha=4.0, layers=(1,)), seed=1)
    values = {"client": "ann", "run": "r", "round": 1, "adapter": start, "data": data, "plan": PLAN}
    return ClientJob(**{**values, **change})  # type: ignore[arg-type]


def start_process(base: BaseRef, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "clients.trainer_process", "--base", str(base.path)]
    command += ["--socket", str(folder / "t.sock"), "--ledger", str(folder / "ledger.sqlite")]
    command += ["--simulated"]
    return subprocess.Popen([*command, *more])


@pytest.fixture(scope="module")
def running(base: BaseRef, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("process")
    process = start_process(base, folder, "--parent", str(os.getpid()))
    try:
        TrainerClient(folder / "t.sock").wait_ready(300.0, lambda: process.poll() is None)
        yield folder
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture
def nearby(base: BaseRef, tmp_path: Path) -> Iterator[tuple[Path, ResidentTrainer]]:
    """The same server on a thread of this process."""
    path, trainer = tmp_path / "t.sock", ResidentTrainer(base, threads=1)
    listener = listen(path)

    def run() -> None:
        try:
            serve(listener, trainer)
        except OSError:
            return  # the listener was shut down

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield path, trainer
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(120)


def test_a_job_gives_the_same_bits_here_and_there(
    base: BaseRef, examples: Examples, running: Path, data_file: Path
) -> None:
    here = ResidentTrainer(base, threads=1)
    there = TrainerClient(running / "t.sock", timeout=300.0)
    jobs = [
        job(base, examples, client="plain"),
        job(base, examples, client="private", privacy=PRIVATE, seed=4),
        job(base, DataSource(data_file), client="by-path", privacy=PRIVATE),
    ]
    for mine, theirs in zip(here.train(jobs), there.train(jobs), strict=True):
        assert isinstance(mine, Update)
        assert isinstance(theirs, Update)
        assert theirs.adapter.digest == mine.adapter.digest
        assert theirs.metrics == mine.metrics
        assert theirs.privacy_event == mine.privacy_event
        assert (theirs.client, theirs.weight, theirs.start) == (
            mine.client,
            mine.weight,
            mine.start,
        )
    assert there.evaluate(jobs[0].adapter, examples) == here.evaluate(jobs[0].adapter, examples)
    assert Ledger(running / "ledger.sqlite").clients() == ("by-path", "private")
    assert (running / "t.sock").stat().st_mode & 0o077 == 0


def test_everything_that_an_assignment_needs_goes_over_the_socket(
    nearby: tuple[Path, ResidentTrainer], base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    there, here = TrainerClient(nearby[0], timeout=300.0), ResidentTrainer(base, threads=1)
    extra = initial_adapter(adapter_spec(base, LABELS, rank=3, alpha=6.0, layers=(0,)), seed=2)
    extra = Adapter(extra.spec, {key: value + 0.1 for key, value in extra})
    jobs: list[dict[str, Any]] = [
        {"assignment": Assignment(trains="B", sends="B"), "codec": "int8"},
        {"assignment": Assignment(sends="A", keeps="B", holdout=0.2), "beside": (extra,)},
        {"assignment": Assignment(sketch=5, seed=9)},
        {"assignment": Assignment(keeps="overlay", mix=0.25), "beside": (extra, extra)},
        {"codec": "top-k(density=0.2, error_feedback=true)"},
        {"assignment": Assignment(select="random", share=0.5, seed=4), "privacy": PRIVATE},
    ]

    def asked(folder: str) -> list[ClientJob]:
        return [
            replace(job(base, examples, client=f"c{i}"), memory=tmp_path / folder, **change)
            for i, change in enumerate(jobs)
        ]

    for mine, theirs in zip(here.train(asked("h")), there.train(asked("t")), strict=True):
        assert isinstance(mine, Update)
        assert isinstance(theirs, Update)
        assert theirs.adapter.digest == mine.adapter.digest
        assert mine.parcel is not None
        assert theirs.parcel is not None
        assert (theirs.parcel.codec, theirs.parcel.keys) == (mine.parcel.codec, mine.parcel.keys)
        assert theirs.parcel.data == mine.parcel.data
        assert theirs.sketches.keys() == mine.sketches.keys()
        assert all(np.array_equal(theirs.sketches[k], mine.sketches[k]) for k in mine.sketches)
        assert theirs.metrics == mine.metrics
    files = [sorted(f.rglob("*.safetensors")) for f in (tmp_path / "h", tmp_path / "t")]
    assert len(files[0]) == len(jobs)
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    for i in (1, 3):
        one = asked("h")[i]
        owner = Owner(
            client=one.client, run="r", round=1, assignment=one.assignment, memory=one.memory
        )
        found = there.evaluate(one.adapter, examples, beside=one.beside, owner=owner)
        assert found == here.evaluate(one.adapter, examples, beside=one.beside, owner=owner)
        assert found != here.evaluate(one.adapter, examples, beside=one.beside)
        assert found != here.evaluate(one.adapter, examples, owner=owner)


def test_failures_come_back_by_their_word(
    base: BaseRef, examples: Examples, running: Path, tmp_path: Path
) -> None:
    there = TrainerClient(running / "t.sock", timeout=300.0)
    absent = DataSource(tmp_path / "absent.jsonl")
    results = there.train([job(base, absent), job(base, examples, client="bob")])
    assert isinstance(results[0], JobFailure)
    assert results[0].fault is JobFault.BAD_DATA
    assert isinstance(results[1], Update)
    with pytest.raises(DataError, match="no such file"):
        there.evaluate(job(base, examples).adapter, absent)
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatch):
        there.evaluate(job(other, examples).adapter, examples)
    with pytest.raises(TrainerError, match="already listens"):
        listen(running / "t.sock")


def test_a_process_ends_with_the_one_that_it_watches(base: BaseRef, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = start_process(base, tmp_path, "--parent", str(parent.pid))
    try:
        parent.kill()
        parent.wait(120)
        until(lambda: process.poll() is not None, what="the trainer to end")
    finally:
        process.kill()
        process.wait()


def test_a_kill_in_the_middle_of_training_is_counted_once(
    base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    process = start_process(base, tmp_path)
    client = TrainerClient(tmp_path / "t.sock", timeout=300.0)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    try:
        client.wait_ready(300.0, lambda: process.poll() is None)
        endless = job(base, examples, plan=TrainingPlan(sample_rate=0.25, steps=90_000),
                      privacy=LocalPrivacy(noise_multiplier=50.0, delta=1e-3))  # fmt: skip
        errors: list[Exception] = []

        def ask() -> None:
            try:
                client.train([endless])
            except TrainerError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: ledger.head().count == 1, what="the event to be spent")
        process.send_signal(signal.SIGKILL)
        thread.join(120)
        assert len(errors) == 1
        with pytest.raises(TrainerError, match="is the process running"):
            client.train([endless])
    finally:
        process.kill()
        process.wait()
    assert ledger.verify().count == 1
    assert ledger.spent("ann", 1e-3) == epsilon([ledger.table()[0].event], 1e-3)
    listen(tmp_path / "t.sock").close()  # the socket that the dead one left is no obstacle


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" + b" " * 32,
        b"APT2" + b"\xff" * 12,
        b"APT2" + (2).to_bytes(4, "big") + bytes(8) + b"{}",
        b"APT2" + (26).to_bytes(4, "big") + bytes(8) + b'{"adapters":[],"blobs":[]}',
        b"APT2" + (4).to_bytes(4, "big") + (4).to_bytes(8, "big") + b"\x80\x04N." + b"abcd",
        b"APT2",
    ],
)
def test_garbage_is_answered_with_an_error_and_the_next_request_works(
    nearby: tuple[Path, ResidentTrainer], sent: bytes
) -> None:
    path, _ = nearby
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = receive(connection)
    assert answer.header["kind"] == "TrainerError"
    assert list(answer.adapters) == []
    TrainerClient(path, timeout=300.0).wait_ready(300.0)


def test_a_client_that_goes_away_harms_nobody(
    nearby: tuple[Path, ResidentTrainer], base: BaseRef, examples: Examples
) -> None:
    path, _ = nearby
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
    assert isinstance(TrainerClient(path, 60.0).train([job(base, examples)])[0], Update)


def test_a_socket_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="shorter"):
        listen(tmp_path / ("x" * 120))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match="cannot listen"):
        listen(tmp_path / "file" / "t.sock")
    with pytest.raises(TrainerError, match="was not ready within"):
        TrainerClient(tmp_path / "absent.sock").wait_ready(0.0)
    with pytest.raises(TrainerError, match="ended before"):
        TrainerClient(tmp_path / "absent.sock").wait_ready(5.0, lambda: False)


def test_what_a_limit_refuses_is_refused_by_its_name(
    nearby: tuple[Path, ResidentTrainer], base: BaseRef, examples: Examples, tmp_path: Path
) -> None:
    path, trainer = nearby
    trainer._ledger = Ledger(tmp_path / "ledger.sqlite")
    trainer._ledger.set_limit(Terms(delta=1e-3, epsilon=7.0))
    asked = job(base, examples)
    owner = Owner(client="ann", run="r", round=1)
    with pytest.raises(BudgetExceeded, match="measuring on its own rows") as refused:
        TrainerClient(path).evaluate(asked.adapter, examples, owner=owner)
    assert _fault(refused.value) is ClientFault.BUDGET_EXCEEDED


def test_a_device_has_a_secret_of_its_own_unless_it_is_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The seed in a task is known to whoever sent it, and so would be all noise."""
    least = ["--socket", "t.sock"]
    with pytest.raises(SystemExit):
        parsed(least)
    assert "--ledger is missing" in capsys.readouterr().err
    assert parsed([*least, "--ledger", "a/l.sqlite"]).device_key == Path("a/l.sqlite.key")
    named = parsed([*least, "--ledger", "a/l.sqlite", "--device-key", "b/key"])
    assert named.device_key == Path("b/key")
    assert parsed([*least, "--simulated"]).device_key is None
    with pytest.raises(SystemExit):
        parsed([*least, "--simulated", "--device-key", "b/key"])
