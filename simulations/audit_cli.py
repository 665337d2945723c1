"""``airpeft privacy audit``: a mechanism's epsilon, measured from below beside the one it claims.

It stands here and not with the other verbs of ``airpeft privacy`` because it trains a model.
Tables are for people; ``--format json`` prints ``{"schema": "airpeft.v1.privacy-audit", "data":
...}``. Exit codes: 0 the claim was not refuted; 1 the mechanism is broken; 2 bad input;
3 interrupted.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.output import AsFormat, Format, envelope

if TYPE_CHECKING:
    from privacy.audit import Audit
    from simulations.audit_task import Task

BROKEN, BAD_INPUT, INTERRUPTED = 1, 2, 3


class Mechanism(StrEnum):
    """Where the noise is added."""

    LOCAL = "local"
    CENTRAL = "central"


class AccountantName(StrEnum):
    """The accountants, by name."""

    RDP = "rdp"
    PLD = "pld"


def audit(
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished simulation: audit one of its clients."),
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="With --run: which; by default the one that spent most.")
    ] = None,
    mechanism: Annotated[
        Mechanism, typer.Option(help="local: DP-SGD on a client; central: noise on the sum.")
    ] = Mechanism.LOCAL,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise over the clip; with --epsilon, that is the claim.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="The claim; without --noise-multiplier, noise for it. [4]")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of the claim. [1e-5]")] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Share of rows in a step, of clients in a round. [0.08]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each round; central: rounds in all. [130]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Local: rounds of so many steps. [1]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="The clip. [1]")] = None,
    accountant: Annotated[
        AccountantName | None, typer.Option(help="Who counts the claim. [rdp]")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a known name or a folder. [minilm]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows (.jsonl, .csv, .tsv). [the shipped sentences]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text. [text]")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class. [label]")] = None,
    rows: Annotated[int | None, typer.Option(help="Use so many of the rows. [400]")] = None,
    canaries: Annotated[
        int | None, typer.Option(help="How many. By default, enough to refute the claim.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Root of all randomness.")] = 0,
    format: AsFormat = Format.TABLE,  # noqa: A002 - the name of the option
) -> None:
    """Measure a mechanism's epsilon from below, beside the epsilon that it claims.

    Canaries are put in or left out by coins, the mechanism runs once, and their coins are guessed
    from all that it releases (Steinke et al. 2023). Too many right guesses refute the claim. A
    claim that is not refuted is not proven.

    For example:

      airpeft privacy audit --epsilon 4

      airpeft privacy audit --data mine.csv --text comment --label verdict --epsilon 2 --delta 1e-6

      airpeft privacy audit --run runs/quick

      airpeft privacy audit --mechanism central --noise-multiplier 1 --sample-rate 0.1 --steps 50

      airpeft privacy audit --noise-multiplier 0.4 --epsilon 1 --format json

    Exit codes: 0 the claim was not refuted; 1 the mechanism is broken; 2 bad input; 3 interrupted.
    """
    given = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "delta": delta,
        "sample_rate": sample_rate,
        "steps": steps,
        "rounds": rounds,
        "max_grad_norm": max_grad_norm,
        "accountant": accountant.value if accountant else None,
        "base": base,
        "data": data,
        "text": text,
        "label": label,
        "rows": rows,
    }
    from aggregation.errors import AggregationError
    from clients.errors import ClientError
    from privacy.errors import PrivacyError
    from simulations.audit_task import Options
    from simulations.errors import SimulationError

    options = Options(
        mechanism=mechanism.value,
        given={name: value for name, value in given.items() if value is not None},
        run=run,
        client=client,
        canaries=canaries,
        confidence=confidence,
        seed=seed,
    )
    try:
        task = options.task()
        with _Bar(task.subject.event.steps) as bar:
            found = task.subject.audit(task.question, bar.show)
    except (AggregationError, ClientError, PrivacyError, SimulationError) as error:
        typer.echo(f"airpeft privacy audit: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("airpeft privacy audit: interrupted; nothing was found out", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if format is Format.JSON:
        document = envelope("privacy-audit", _document(task, found))
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        _table(task, found)
    raise typer.Exit(BROKEN if found.broken else 0)


def _document(task: Task, found: Audit) -> dict[str, Any]:
    event = task.subject.event
    return {
        **found.to_mapping(),
        "claimed_by": task.source,
        "subject": task.subject.words,
        "parameters": task.subject.parameters,
        "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate,
        "max_grad_norm": event.max_grad_norm,
        "unit": "client" if found.mechanism == "central" else "example",
        "seed": task.question.seed,
    }


def _table(task: Task, found: Audit) -> None:
    event, central = task.subject.event, found.mechanism == "central"
    each = (
        "rounds, each with {:.3%} of the clients"
        if central
        else "steps, each with {:.3%} of the rows"
    )
    lines = [
        ("audited", f"{task.subject.words}, {task.subject.parameters:,} parameters"),
        ("", f"{found.steps:,} {each.format(event.sample_rate)}"),
        (
            "claimed",
            f"epsilon at most {found.claimed:.4f} at delta {found.delta:g}, by {task.source}",
        ),
        (
            "measured",
            f"epsilon at least {found.measured:.4f}, with {found.confidence:.0%} confidence",
        ),
        ("canaries", f"{found.canaries:,}, {found.planted:,} of them planted"),
        ("guesses", f"{found.guesses:,}, {found.right:,} of them right"),
        ("noise", f"{found.noise_seen:.4f} times the clip; {found.noise_claimed:.4f} claimed"),
        ("reach", f"{found.reach_seen:.4f} clips for one canary in one sum; at most 1 claimed"),
    ]
    for name, words in lines:
        typer.echo(f"{name:<10}{words}")
    typer.echo("")
    for sentence in _verdict(task, found):
        typer.echo(sentence)


def _verdict(task: Task, found: Audit) -> list[str]:
    from privacy.audit import most, refutable

    if found.broken:
        return [f"This mechanism is broken: {fault}." for fault in found.faults]
    said = ["The claim was not refuted. That is no proof of it: a better attack may show more."]
    if not found.refutable:
        limit = most(found.canaries, found.delta, found.confidence)
        said.append(
            f"The bound could not have refuted so large a claim: {found.canaries:,} canaries show "
            f"an epsilon of {limit:.4f} at most, even where all is given away. Only noise and "
            "reach were tested."
        )
        room = task.subject.parameters
        if refutable(room, found.claimed, found.delta, found.confidence):
            said.append(f"With --canaries {room} it could.")
    return said


class _Bar:
    """Progress on standard error: a live bar on a terminal, a line for each fifth elsewhere."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._live, self._steps = console.is_terminal, steps
        self._progress = Progress(console=console, disable=not self._live, transient=True)
        self._task = self._progress.add_task("auditing", total=steps)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: int) -> None:
        """So many steps are done."""
        self._progress.update(self._task, completed=step)
        if not self._live and 5 * step // self._steps > 5 * (step - 1) // self._steps:
            sys.stderr.write(f"step {step:,} of {self._steps:,}\n")
            sys.stderr.flush()
