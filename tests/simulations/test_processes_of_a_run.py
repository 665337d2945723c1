"""Runs in processes of their own: killed, interrupted, with workers, on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from privacy.ledger import Ledger
from simulations.run import simulate
from tests.simulations.world import world_scenario
from tests.waiting import until


def start(world: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "airpeft", "simulate", str(world), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--format", "json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        start_new_session=True,
        # Where the tests run in the background, Ctrl-C is ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def rounds_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def test_killed_in_the_middle_a_run_ends_the_same(world: Path, tmp_path: Path) -> None:
    process = start(world, tmp_path / "run", "--workers", "0", "--set", "federation.rounds=25")
    try:
        until(lambda: rounds_done(tmp_path / "run") >= 3, 90, what="two rounds")
    finally:
        process.kill()
        process.communicate()
    assert rounds_done(tmp_path / "run") < 26, "the run was over before it could be killed"
    scenario = world_scenario(world, "federation.rounds=25")
    resumed = simulate(scenario, tmp_path / "run")
    whole = simulate(scenario, tmp_path / "whole")
    assert resumed.adapter.digest == whole.adapter.digest
    entries = [(e.client, e.round) for e in Ledger(tmp_path / "run" / "ledger.sqlite").table()]
    assert len(entries) == len(set(entries)) == 3 * 25


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_adapter(world: Path, tmp_path: Path) -> None:
    digests = {
        simulate(world_scenario(world), tmp_path / f"{n}", workers=n).adapter.digest
        for n in (0, 1, 2)
    }
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_no_worker_outlives_the_run_and_the_run_goes_on(
    world: Path, tmp_path: Path, how: signal.Signals
) -> None:
    rounds = ["--set", "federation.rounds=30"]
    process = start(world, tmp_path / "run", "--workers", "2", *rounds)
    try:
        until(lambda: rounds_done(tmp_path / "run") >= 2, 120, what="a round")
        children = family(process)
        assert len(children) == 2
        process.send_signal(how)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    until(lambda: gone(children), 20, what="the end of the workers")
    if how is signal.SIGINT:
        assert process.returncode == 3
        assert "the same command goes on" in errors
    scenario = world_scenario(world, "federation.rounds=30")
    whole = simulate(scenario, tmp_path / "whole")
    if how is signal.SIGKILL:  # once by the command, once by the call: it is the same
        assert simulate(scenario, tmp_path / "run").adapter.digest == whole.adapter.digest
        return
    again = start(world, tmp_path / "run", "--workers", "2", *rounds)
    output, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    assert "going on after round" in errors
    assert json.loads(output)["data"]["adapter"]["digest"] == whole.adapter.digest


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_client_is_left_out_at_most_once(
    world: Path, tmp_path: Path
) -> None:
    rounds = ["--set", "federation.rounds=30"]
    process = start(world, tmp_path / "run", "--workers", "2", *rounds)
    try:
        until(lambda: rounds_done(tmp_path / "run") >= 2, 120, what="a round")
        os.kill(family(process)[0].pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    refused = [r["refused"] for r in json.loads(output)["data"]["rounds"] if r["refused"]]
    assert len(refused) <= 1
    assert all(set(r.values()) == {"trainer-unavailable"} for r in refused)


@pytest.mark.slow
def test_ray_gives_the_same_result(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    scenario = world_scenario(world, "federation.rounds=2")
    here = simulate(scenario, tmp_path / "local")
    process = start(world, tmp_path / "ray", "--backend", "ray", "--set", "federation.rounds=2")
    output, errors = process.communicate(timeout=220)
    assert process.returncode == 0, errors
    from aggregation import peft_layout

    there = peft_layout.read(tmp_path / "ray" / "adapter")
    assert json.loads(output)["data"]["adapter"]["digest"] == there.digest
    assert np.abs(here.adapter.pack() - there.pack()).max() <= 1e-5
