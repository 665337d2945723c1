"""``airpeft demo``: options in, live progress, a summary table out."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.output import AsFormat, Format

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.demo_result import DemoResult
    from simulations.fleet import Fleet

SCENARIO = Path(__file__).parent.parent / "scenarios" / "demo.toml"


def demo(
    scenario: Annotated[
        Path, typer.Argument(help="What to train; scenarios/demo.toml by default.")
    ] = SCENARIO,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/demo-<time> by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: federation.rounds=2.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Root of all randomness of the training.")
    ] = None,
    devices: Annotated[int, typer.Option(min=2, max=20, help="Device processes.")] = 5,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Trainer processes.")] = 2,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave server and devices running until Ctrl-C.")
    ] = False,
    output: AsFormat = Format.TABLE,
) -> None:
    """Run the whole loop on this machine, with no network.

    Trains an adapter over simulated clients with differential privacy, signs it, rolls it out to
    device processes that serve predictions meanwhile, attacks the fleet in three ways, and prints
    what happened.

    For example:

      airpeft demo

      airpeft demo --keep

      airpeft demo --set federation.rounds=2 --devices 3 --format json

    Exit status: 0 all went as it must; 1 something did not, or a process failed; 2 bad input;
    3 interrupted (every child process has been stopped).
    """
    raise typer.Exit(_run(scenario, out, overrides or [], seed, devices, workers, keep, output))


def _run(
    path: Path,
    out: Path | None,
    overrides: list[str],
    seed: int | None,
    devices: int,
    workers: int,
    keep: bool,
    output: Format,
) -> int:
    from rich.console import Console

    from aggregation.errors import AggregationError
    from clients.errors import ClientError
    from federation.errors import FederationError
    from privacy.errors import PrivacyError
    from simulations.demo import DemoOptions, run_demo
    from simulations.demo_view import LineView, LiveView
    from simulations.errors import SimulationError
    from simulations.scenario import ScenarioError, load

    console = Console(stderr=output is Format.JSON)
    if not console.is_terminal:
        console.width = 100  # a file has none
    try:
        folder = (out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
        options = DemoOptions(
            load(path, overrides=overrides, seed=seed), folder, devices=devices, workers=workers
        )
        live = console.is_terminal and output is Format.TABLE
        view = LiveView(console) if live else LineView(console)
        with view:
            result = run_demo(options, view, keep=_keeper(console, view, output) if keep else None)
    except ScenarioError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; every child process has been stopped", style="yellow")
        return 3
    except (
        SimulationError,
        FederationError,
        ClientError,
        PrivacyError,
        AggregationError,
    ) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1
    if not keep:
        _print(console, result, output)
    return 1 if result.problems else 0


def _keeper(console: Console, view: Any, output: Format) -> Any:
    def keeper(result: DemoResult, fleet: Fleet) -> None:
        view.__exit__(None, None, None)
        _print(console, result, output)
        for line in how_to_talk(fleet):
            console.print(line, highlight=False, soft_wrap=True)
        threading.Event().wait()  # until Ctrl-C

    return keeper


def how_to_talk(fleet: Fleet) -> list[str]:
    """Commands that work while the fleet runs."""
    name, url = next(iter(fleet.endpoints().items()))
    body = '{"texts": ["A lovely film."]}'
    return [
        "",
        "Server and devices are running; Ctrl-C stops them all. In another terminal:",
        f"  airpeft fleet list --home {fleet.server_home}",
        f"  airpeft rollout status --home {fleet.server_home}",
        f"  airpeft device status --home {fleet.device_home(name)}",
        f"  curl -s {url}/v1/classify -H 'content-type: application/json' -d '{body}'",
    ]


def _print(console: Console, result: DemoResult, output: Format) -> None:
    if output is Format.JSON:
        from simulations.demo_summary import document

        sys.stdout.write(json.dumps(document(result), indent=2) + "\n")
    else:
        from simulations.demo_summary import tables

        for part in tables(result):
            console.print(part, highlight=False)
