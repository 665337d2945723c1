"""A whole simulation, from a scenario to a run folder.

    from simulations.run import simulate
    from simulations.scenario import load

    result = simulate(load(Path("scenarios/quick.toml")), Path("runs/quick"))

Interrupted at any moment, even by a kill, the same call on the same folder goes on after the last
round that was finished, and ends with the same adapter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from clients.client_app import app as client_app
from clients.client_app import resident
from simulations import folder, preflight, workers
from simulations.events import Event
from simulations.folder import Run, RunError
from simulations.grid import LocalGrid
from simulations.scenario import Scenario
from simulations.server_app import RunResult, serve

BACKENDS = ("local", "ray")
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_log = logging.getLogger("airpeft.simulations.run")


def simulate(
    scenario: Scenario,
    out: Path,
    *,
    backend: str = "local",
    workers: int = 0,
    progress: Callable[[Event], None] = lambda _: None,
) -> RunResult:
    """Run a scenario, or go on with it where an earlier process stopped.

    The result depends on the scenario alone: not on the number of workers, and on the backend only
    in the last bits of the sums.

    Args:
        scenario: what to run.
        out: the run folder; made if it is missing.
        backend: ``local`` for this package's own grid, ``ray`` for Flower's simulation on Ray.
        workers: processes that train side by side; 0 to train in this one. Each takes about
            half a gigabyte. Not used by Ray, which uses all processors.
        progress: called from this thread for everything that happens.

    Raises:
        RunError: if the folder holds another run or is in use, or the backend is not installed.
        SimulationError: if the scenario can't be run.
        FederationError: if the rounds can't go on.
        StorageError: if the disk is full; free some space and call again.
    """
    if backend not in BACKENDS:
        raise RunError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if not 0 <= workers <= 256:
        raise RunError(f"workers={workers} is outside 0..256")
    ready = preflight.draft(scenario)
    with folder.locked(out) as where:
        run = folder.prepare(scenario, where, ready)
        progress(run.event())
        if backend == "ray":
            return _on_ray(run, progress)
        return _locally(run, workers, progress)


def _locally(run: Run, count: int, progress: Callable[[Event], None]) -> RunResult:
    count = min(count, run.clients)
    name = run.scenario.base.name
    with (
        workers.pool(count, name, run.ledger, run.out / "logs") if count else nullcontext() as pool
    ):
        trainer = workers.WorkerTrainer(pool[0]) if pool else resident(name, run.ledger, False, 1)
        with LocalGrid(client_app, run.clients, workers=pool or ()) as grid:
            return serve(grid, run, trainer, folder.SIMULATED, progress)


def _on_ray(run: Run, progress: Callable[[Event], None]) -> RunResult:
    if getattr(run.config.chosen().private, "secure", False):
        raise RunError(
            "backend 'ray' gives the messages of a client to any of its processes, and a secure "
            "sum keeps its secrets in the memory of one; choose backend 'local'"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        import ray  # noqa: F401
    except ImportError:
        raise RunError("backend 'ray' needs Ray: pip install 'airpeft[ray]'") from None
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation
    from flwr.supercore import telemetry

    # Flower reads the variable when it is first imported, which may have been before.
    telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
    done: list[RunResult] = []
    failed: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        # Flower runs this on a thread and reports an error of its own; ours is kept for the caller.
        try:
            trainer = resident(run.scenario.base.name, run.ledger, False, 1)
            done.append(serve(grid, run, trainer, folder.SIMULATED, progress))
        except BaseException as error:
            failed.append(error)
            raise

    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False},
    }
    try:
        run_simulation(server_app, client_app, num_supernodes=run.clients, backend_config=backend)
    except Exception as error:
        if failed:
            raise failed[0] from error
        raise RunError(f"Flower's simulation ended with {type(error).__name__}: {error}") from error
    if not done:
        raise failed[0] if failed else RunError("Flower's simulation ended without a result")
    return done[0]
