"""``airpeft simulate``: a scenario on the command line."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.output import Format, envelope

if TYPE_CHECKING:
    from simulations.events import Event
    from simulations.server_app import RunResult

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 3


class Backend(StrEnum):
    """What carries the messages."""

    LOCAL = "local"
    RAY = "ray"


def simulate(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, as train.rank=4."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replace the scenario's seed.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder. Default: runs/ and the name of the run."),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="local: in this process and its workers; ray: Flower's.")
    ] = Backend.LOCAL,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=256, help="Training processes; 0: none. Default: one per core."),
    ] = None,
    format: Annotated[  # noqa: A002 - the name of the option
        Format, typer.Option(help="What is printed at the end.")
    ] = Format.TABLE,
) -> None:
    """Train an adapter over simulated clients, and write a run folder.

    Interrupted at any moment, the same command goes on where it was. The same scenario and seed
    give the same adapter.

    For example:

      airpeft simulate scenarios/quick.toml

      airpeft simulate scenarios/demo.toml --set privacy.epsilon=3 --seed 2 --out runs/three

      airpeft simulate scenarios/mixed.toml --set "federation.pieces.reduce=krum(liars=1)"

    Exit codes: 0 done; 1 failed; 2 the scenario, its data or the folder is not usable;
    3 interrupted, and the same command goes on.
    """
    from aggregation.errors import AggregationError
    from federation.errors import FederationError
    from privacy.errors import PrivacyError
    from simulations.errors import SimulationError
    from simulations.scenario import load

    try:
        loaded = load(scenario, overrides=override or (), seed=seed)
        from simulations.run import simulate as run

        warning = loaded.chosen().warning
        if warning:
            typer.echo(f"warning: recipe {loaded.federation.recipe}: {warning}", err=True)
        with _Display() as display:
            result = run(
                loaded,
                out or Path("runs") / loaded.run,
                backend=backend.value,
                workers=_cores() if workers is None else workers,
                progress=display.show,
            )
    except SimulationError as error:
        _complain(str(error), BAD_INPUT)
    except (AggregationError, FederationError, PrivacyError) as error:
        _complain(str(error), FAILED)
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on where it was", INTERRUPTED)
    if format is Format.JSON:
        typer.echo(json.dumps(envelope("simulation", _document(result)), indent=1))
    else:
        _table(result)


def _complain(message: str, code: int) -> None:
    typer.echo(f"airpeft simulate: {message}", err=True)
    raise typer.Exit(code)


def _cores() -> int:
    import os

    found = len(os.sched_getaffinity(0))
    return found if found > 1 else 0


def _document(result: RunResult) -> dict[str, Any]:
    return {
        "run": result.run,
        "out": str(result.out),
        "adapter": {"digest": result.adapter.digest, "folder": str(result.adapter_folder)},
        "report": str(result.report),
        "rounds": list(result.metrics),
        "privacy": result.privacy,
    }


def _table(result: RunResult) -> None:
    from rich.console import Console
    from rich.table import Table

    last = result.metrics[-1]
    private, personal = last["epsilon_max"] is not None, "personal_accuracy" in last
    of_clients = last.get("client_epsilon") is not None
    table = Table(title=f"run {result.run}", title_justify="left")
    columns = ["round", *(["own accuracy"] * personal), "accuracy", "loss", "used", "left out"]
    measured = last["aggregation_error"] is not None
    for name in (*columns, *(["error"] * measured), "up", "down"):
        table.add_column(name, justify="right")
    if private:
        table.add_column("largest ε", justify="right")
    if of_clients:
        table.add_column("client ε", justify="right")
    for m in result.metrics:
        cells = [
            str(m["round"] or "start"),
            *([_percent(m.get("personal_accuracy"))] * personal),
            _percent(m["accuracy"]),
            f"{m['loss']:.4f}",
            *((str(m["used"]), str(len(m["refused"]))) if m["round"] else ("", "")),
            *(
                (
                    *([_percent(m["aggregation_error"], 2)] * measured),
                    _size(m["bytes_up"]),
                    _size(m["bytes_down"]),
                )
                if m["round"]
                else [""] * (2 + measured)
            ),
        ]
        if private:
            cells.append(f"{m['epsilon_max']:.2f}" if m["round"] else "")
        if of_clients:
            cells.append(f"{m['client_epsilon']:.2f}" if m["round"] else "")
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has none, and in it nothing is to be cut off
    console.print(table)
    console.print(f"adapter  {result.adapter.digest}", soft_wrap=True, highlight=False)
    console.print(f"         {result.adapter_folder}", soft_wrap=True, highlight=False)
    console.print(f"report   {result.report}", soft_wrap=True, highlight=False)


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _size(count: int) -> str:
    from simulations.report import size

    return size(count)


class _Display:
    """Progress on standard error: a live bar on a terminal, one line for each round elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("preparing", total=None)
        self._rounds = 0

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        from simulations import events

        match event:
            case events.Prepared():
                self._rounds = event.rounds
                rows = sum(sum(counts) for counts in event.clients.values())
                goes_on = f", going on after round {event.done}" if event.done else ""
                self._line(
                    f"run {event.run}: {len(event.clients)} clients, {rows} texts, "
                    f"{event.heldout} held out{goes_on}"
                )
                if event.gradients:
                    self._line(f"gradients per example by {event.gradients}")
                self._bar("measuring the start", 0, None)
            case events.RoundStarted():
                self._bar(f"round {event.round} of {self._rounds}", 0, len(event.cohort))
            case events.ClientDone():
                if event.refused:
                    self._line(f"  {event.client} is left out: {event.refused}")
                self._progress.advance(self._task)
            case events.RoundDone():
                self._line(_round(event.metrics))
            case events.Finished():
                pass

    def _line(self, text: str) -> None:
        if self._live:
            self._progress.print(text, highlight=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _bar(self, text: str, completed: int, total: int | None) -> None:
        self._progress.reset(self._task, description=text, completed=completed, total=total)


def _round(m: Any) -> str:
    name = f"round {m['round']:>3}" if m["round"] else "start    "
    parts = [f"{name}  accuracy {100 * m['accuracy']:5.1f} %", f"loss {m['loss']:.4f}"]
    if "personal_accuracy" in m:
        parts.insert(1, f"own {100 * m['personal_accuracy']:5.1f} %")
    if m["round"]:
        parts.append(f"{m['used']} of {m['cohort']} clients")
        if m["epsilon_max"] is not None:
            parts.append(f"largest ε {m['epsilon_max']:.2f}")
        if m.get("client_epsilon") is not None:
            parts.append(f"client ε {m['client_epsilon']:.2f}")
        parts.append(f"{m['seconds']:.1f} s")
    return "  ".join(parts)
