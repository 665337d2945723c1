"""Runs in processes of their own: killed, interrupted, with workers, on Ray."""

from __future__ import annotations

import contextlib
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
from tests.processes import hearing
from tests.simulations.world import world_scenario
from tests.waiting import until


def start(world: Path, out: Path, sockets: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "airpeft", "simulate", str(world), "--out", str(out)]
    return subprocess.Popen(
        hearing([*command, "--format", "json", *more]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TMPDIR": str(sockets)},
        start_new_session=True,
    )


MANY = (25, 100, 400)  # rounds: more, if the run before was over too soon


def rounds_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def until_its_middle(out: Path, process: subprocess.Popen[str], rounds: int) -> bool:
    """Wait for two rounds of a run; whether it is not over by then, as on a machine in fits."""

    def there() -> bool:
        return process.poll() is not None or rounds_done(out) >= 3

    until(there, what="two rounds")
    return process.poll() is None and rounds_done(out) < rounds


def test_killed_in_the_middle_a_run_ends_the_same(
    world: Path, tmp_path: Path, sockets: Path
) -> None:
    for rounds in MANY:
        out, more = tmp_path / f"run-{rounds}", f"federation.rounds={rounds}"
        process = start(world, out, sockets, "--workers", "0", "--set", more)
        try:
            until_its_middle(out, process, rounds)
        finally:
            process.kill()
            process.communicate()
        if rounds_done(out) <= rounds:
            break
    assert 3 <= rounds_done(out) <= rounds, "each run was over before it could be killed"
    scenario = world_scenario(world, more)
    resumed = simulate(scenario, out)
    whole = simulate(scenario, tmp_path / "whole")
    assert resumed.adapter.digest == whole.adapter.digest
    entries = [(e.client, e.round) for e in Ledger(out / "ledger.sqlite").table()]
    assert len(entries) == len(set(entries)) == 3 * rounds


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
    world: Path, tmp_path: Path, sockets: Path, how: signal.Signals
) -> None:
    for rounds in MANY:
        out, more = tmp_path / f"run-{rounds}", f"federation.rounds={rounds}"
        process = start(world, out, sockets, "--workers", "2", "--set", more)
        try:
            in_time = until_its_middle(out, process, rounds)
            children = family(process) if in_time else []
            process.send_signal(how)
            _, errors = process.communicate(timeout=180)
        finally:
            process.kill()
        if in_time and process.returncode != 0:
            break
    assert process.returncode == (3 if how is signal.SIGINT else -how), errors
    assert len(children) == 2
    until(lambda: gone(children), what="the end of the workers")
    scenario = world_scenario(world, more)
    whole = simulate(scenario, tmp_path / "whole")
    if how is signal.SIGKILL:  # once by the command, once by the call: it is the same
        assert simulate(scenario, out).adapter.digest == whole.adapter.digest
        return
    assert "the same command goes on" in errors
    again = start(world, out, sockets, "--workers", "2", "--set", more)
    output, errors = again.communicate(timeout=400)
    assert again.returncode == 0, errors
    assert "going on after round" in errors
    assert json.loads(output)["data"]["adapter"]["digest"] == whole.adapter.digest


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_client_is_left_out_at_most_once(
    world: Path, tmp_path: Path, sockets: Path
) -> None:
    for rounds in MANY:
        out, more = tmp_path / f"run-{rounds}", f"federation.rounds={rounds}"
        process = start(world, out, sockets, "--workers", "2", "--set", more)
        try:
            in_time = until_its_middle(out, process, rounds)
            for worker in family(process)[:1]:
                worker.kill()
            output, errors = process.communicate(timeout=400)
        finally:
            process.kill()
        if in_time:
            break
    assert in_time, "each run was over before a worker of it could be killed"
    assert process.returncode == 0, errors
    refused = [r["refused"] for r in json.loads(output)["data"]["rounds"] if r["refused"]]
    assert len(refused) <= 1
    assert all(set(r.values()) == {"trainer-unavailable"} for r in refused)


@pytest.mark.slow
def test_ray_gives_the_same_result(world: Path, tmp_path: Path, sockets: Path) -> None:
    pytest.importorskip("ray")
    scenario = world_scenario(world, "federation.rounds=2")
    here = simulate(scenario, tmp_path / "local")
    for number in range(3):
        out = tmp_path / f"ray-{number}"
        more = ("--backend", "ray", "--set", "federation.rounds=2")
        process = start(world, out, sockets, *more)
        output, errors = process.communicate(timeout=400)
        if "timed out during startup" not in errors:  # Ray gives its own processes 30 s
            break
    assert process.returncode == 0, errors
    from aggregation import peft_layout

    there = peft_layout.read(out / "adapter")
    assert json.loads(output)["data"]["adapter"]["digest"] == there.digest
    assert np.abs(here.adapter.pack() - there.pack()).max() <= 1e-5
