"""The main job as its user runs it: real processes, real sockets, the real base model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aggregation import peft_layout
from tests.processes import hearing
from tests.waiting import until

SMALL = [
    *("--set", "data.rows=2000", "--set", "data.heldout=0.3", "--set", "partition.clients=4"),
    *("--set", "partition.scheme=iid", "--set", "federation.rounds=2"),
    *("--set", "federation.min_updates=2", "--set", "train.sample_rate=0.3"),
    *("--set", "train.steps=4", "--set", "privacy.accountant=rdp", "--devices", "2"),
    # Little data and little noise: what is tried here is the loop, not how much privacy costs.
    *("--set", "privacy.epsilon=50.0"),
]


def start(out: Path, sockets: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "airpeft", "demo", "--out", str(out), *SMALL, *more]
    return subprocess.Popen(
        hearing(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(sockets)},
        start_new_session=True,
    )


def of_run(out: Path) -> list[psutil.Process]:
    """Processes that have the run's folder on their command line, the demo's own apart."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(out) in word for word in words) and "demo" not in words:
            found.append(process)
    return found


@pytest.mark.slow
def test_the_whole_loop(tmp_path: Path, sockets: Path) -> None:
    demo = start(tmp_path / "run", sockets, "--format", "json")
    output, errors = demo.communicate(timeout=400)
    assert demo.returncode == 0, errors[-3000:]
    told = json.loads(output)
    data = told["data"]
    assert told["schema"] == "airpeft.v1.demo"
    assert data["ok"]
    assert [attack["reason"] for attack in data["attacks"]] == [
        "payload-digest",
        "metadata-rollback",
        "quality-regressed",
    ]
    assert all(attack["refused"] for attack in data["attacks"])
    assert data["traffic"]["requests"] > 0
    assert data["traffic"]["failed"] == 0
    assert data["accuracy"]["after"] > data["accuracy"]["before"] + 0.1
    assert 0 < data["epsilon"] <= 50.0
    assert data["unit"] == "example"
    for device in data["devices"].values():
        assert {"base", "sentiment-2"} <= set(device["releases_served"])
        assert device["after"] > device["before"]
    # What the devices serve is what lies in the run folder, bit for bit.
    statement = data["releases"][1]["statement"]
    assert peft_layout.read(tmp_path / "run" / "adapter").digest == statement["adapter_digest"]
    assert data["parity"] < 1e-4
    for name in ("report.html", "curves.png", "metrics.jsonl", "fleet.json", "ledger.sqlite"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert "What had to fail" in (tmp_path / "run" / "report.html").read_text()
    assert until(lambda: not of_run(tmp_path), what="no process of the run is left")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_no_child_is_left(
    tmp_path: Path, sockets: Path, how: signal.Signals
) -> None:
    demo = start(tmp_path / "run", sockets)
    try:
        # Server, two devices; the trainers carry the ledger's path.
        until(lambda: len(of_run(tmp_path)) >= 5, what="all children run")
        demo.send_signal(how)
        demo.wait(120)
    finally:
        demo.kill()
        demo.communicate()
    assert demo.returncode == (3 if how is signal.SIGINT else -signal.SIGKILL)
    assert until(lambda: not of_run(tmp_path), what="no child is left")


def test_a_folder_with_a_demo_in_it_is_refused(tmp_path: Path, sockets: Path) -> None:
    (tmp_path / "run" / "fleet").mkdir(parents=True)
    demo = start(tmp_path / "run", sockets)
    output, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "choose another folder" in output + errors


def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, sockets: Path) -> None:
    demo = start(tmp_path / "run", sockets, "--set", "train.rank=0")
    output, errors = demo.communicate(timeout=120)
    assert demo.returncode == 2
    assert "train.rank" in output + errors
    assert not (tmp_path / "run").exists()
