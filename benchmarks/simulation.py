"""LocalGrid against Flower's Ray simulation: the same 20 clients, 3 rounds, whole processes.

Run: ``python benchmarks/simulation.py``. Each backend is a fresh process; the figures are those of
the whole tree of processes that it starts, imports included. CPU seconds come from the operating
system's accounting of every process that ended; this process adopts orphans for that purpose
(prctl(2), PR_SET_CHILD_SUBREAPER). The digests show that both trained the same adapter, or how far
they are apart. At the end: how many times a model was built for how many trained clients.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregation import peft_layout

ROOT = Path(__file__).parent.parent
SCENARIO = ROOT / "scenarios" / "quick.toml"
OVERRIDES = ["partition.clients=20", "data.rows=3000", "federation.rounds=3"]
PR_SET_CHILD_SUBREAPER = 36

COUNT_MODELS = """
import json, sys
from pathlib import Path
from clients import model, trainer
built = 0
real = model.build
def counted(*args, **kwargs):
    global built
    built += 1
    return real(*args, **kwargs)
model.build = counted
if hasattr(trainer, "build"):
    trainer.build = counted
from simulations.run import simulate
from simulations.scenario import load
scenario = load(Path(sys.argv[1]), overrides=json.loads(sys.argv[2]))
result = simulate(scenario, Path(sys.argv[3]), workers=0)
print(json.dumps({"built": built, "trained": sum(line["used"] for line in result.metrics)}))
"""


@dataclass(frozen=True)
class Cost:
    """What one run cost: wall seconds, CPU seconds, and the adapter's folder."""

    wall: float
    cpu: float
    adapter: Path


def run(backend: str, folder: Path) -> Cost:
    command = [sys.executable, "-m", "airpeft", "simulate", str(SCENARIO), "--backend", backend]
    command += ["--out", str(folder), "--workers", "2"]
    for override in OVERRIDES:
        command += ["--set", override]
    before, began = children_cpu(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENV})
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    reap_orphans()
    return Cost(wall, children_cpu() - before, folder / "adapter")


ENV = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reap_orphans(seconds: float = 30.0) -> None:
    """Wait for processes whose parent has ended, so that their time is counted."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.1)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        local = run("local", folder / "local")
        ray = run("ray", folder / "ray")
        one, two = (peft_layout.read(cost.adapter) for cost in (local, ray))
        apart = float(np.abs(one.pack() - two.pack()).max())
        print("20 clients x 3 rounds, quick.toml, two processes or actors")
        print(f"{'':34}{'LocalGrid':>12}{'Ray':>12}{'ratio':>9}")
        for name, a, b in (
            ("CPU seconds of all processes", local.cpu, ray.cpu),
            ("wall seconds from start to end", local.wall, ray.wall),
        ):
            print(f"{name:34}{a:12.1f}{b:12.1f}{b / a:8.1f}x")
        print(f"largest difference of a value     {apart:12.1e}")
        command = [sys.executable, "-c", COUNT_MODELS, str(SCENARIO), json.dumps(OVERRIDES)]
        command += [str(folder / "counted")]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ENV}
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        counted = json.loads(done.stdout.splitlines()[-1])
        print(
            f"models built in one process: {counted['built']}, clients trained in it: "
            f"{counted['trained']}"
        )


if __name__ == "__main__":
    main()
