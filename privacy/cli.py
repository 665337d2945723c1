"""``airpeft privacy``: what training will cost, what it has cost, and what an adapter promises.

Tables and sentences are for people; ``--format json`` prints ``{"schema": "airpeft.v1.privacy-...",
"data": ...}``. Exit codes: 0 done; 1 a ledger that was edited or damaged; 2 bad input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from privacy.ledger_report import Report
    from privacy.planning import Answer, Plan

EDITED, BAD_INPUT = 1, 2

privacy = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Plan a privacy budget, explain a statement, read a ledger, audit a mechanism.",
    epilog="For example: airpeft privacy plan --epsilon 8 --sample-rate 0.1 --steps 100 "
    "--delta 1e-5",
)


class Format(StrEnum):
    """What a command prints."""

    TABLE = "table"
    JSON = "json"


class AccountantName(StrEnum):
    """The accountants, by name; the numbers come from ``privacy.calibration``."""

    RDP = "rdp"
    PLD = "pld"


class UnitName(StrEnum):
    """What neighbouring data sets differ in, by name."""

    EXAMPLE = "example"
    CLIENT = "client"


AsFormat = Annotated[Format, typer.Option("--format", help="Table for people, JSON for programs.")]
ByAccountant = Annotated[
    AccountantName, typer.Option(help="rdp: a safe bound, fast; pld: tight, slower.")
]


@privacy.callback()
def main() -> None:
    """Plan a privacy budget, explain a statement, read a ledger, audit a mechanism."""


@privacy.command()
def plan(
    sample_rate: Annotated[
        float, typer.Option(help="Expected batch over number of examples: above 0, at most 1.")
    ],
    delta: Annotated[float, typer.Option(help="Below 1 over the number of examples.")],
    steps: Annotated[
        int | None, typer.Option(help="Steps of training; of each round, with --rounds.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise over the clipping norm; prints epsilon.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What may be spent in all; prints the noise.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of --steps each; prints epsilon by round.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="The client's rows; delta is checked against them.")
    ] = None,
    unit: Annotated[
        UnitName, typer.Option(help="What is protected; of client, read clients for examples.")
    ] = UnitName.EXAMPLE,
    accountant: ByAccountant = AccountantName.RDP,
    format: AsFormat = Format.TABLE,  # noqa: A002 - the name of the option
) -> None:
    """What a training will cost: epsilon from noise, or noise from epsilon.

    With both, how many rounds the epsilon pays for. Neighbouring data differ by one example added
    or removed; each step draws every example on its own. With --unit client, noise is on the sum
    of clients' updates, and a round is one step: --sample-rate is the probability with which every
    client is drawn on its own, and 1 where cohorts are drawn in any other way.

    For example:

      airpeft privacy plan --noise-multiplier 1.0 --sample-rate 0.08 --steps 130 --delta 1e-5

      airpeft privacy plan --epsilon 8 --sample-rate 0.08 --steps 26 --rounds 5 --delta 1e-5

      airpeft privacy plan --epsilon 8 --noise-multiplier 1 --sample-rate 0.1 --steps 9 --delta 1e-5

      airpeft privacy plan --unit client --epsilon 4 --sample-rate 0.05 --rounds 100 --delta 1e-4
    """
    with _plain_errors("plan"):
        from privacy.budget import Accountant, BudgetError, Unit
        from privacy.planning import Plan, by_accountant

        if steps is None and unit is UnitName.EXAMPLE:
            raise BudgetError("--steps is missing: the steps of training, of each round")
        asked = Plan(
            sample_rate=sample_rate,
            steps=1 if steps is None else steps,
            delta=delta,
            rounds=1 if rounds is None else rounds,
            noise_multiplier=noise_multiplier,
            epsilon=epsilon,
            examples=examples,
            accountant=Accountant(accountant.value),
            unit=Unit(unit.value),
        )
        answer = asked.answer()
        beside = {
            name.value: value
            for name, value in by_accountant(asked, answer.noise_multiplier).items()
        }
    document = _plan_document(asked, answer, beside)
    _show("plan", document, format, lambda: _print_plan(asked, answer, beside))


@privacy.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, with privacy.json.")],
    format: AsFormat = Format.TABLE,  # noqa: A002 - the name of the option
) -> None:
    """An adapter's privacy statement, in plain sentences.

    For example:

      airpeft privacy explain runs/quick/adapter

      airpeft privacy explain runs/quick/adapter --format json
    """
    with _plain_errors("explain"):
        from privacy import statement

        document = statement.read(folder)
        sentences = statement.explain(document)
    data = {"statement": document, "sentences": sentences.splitlines()}
    _show("statement", data, format, lambda: typer.echo(sentences))


@privacy.command()
def ledger(
    path: Annotated[Path, typer.Argument(help="The file: ledger.sqlite of a run or a device.")],
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is computed.")] = 1e-5,
    epsilon: Annotated[
        float | None, typer.Option(help="A client's budget; prints what is left of it.")
    ] = None,
    accountant: ByAccountant = AccountantName.RDP,
    format: AsFormat = Format.TABLE,  # noqa: A002 - the name of the option
) -> None:
    """Who has spent what, over all runs; the chain of hashes is verified first.

    Rounds left are rounds like the client's last one. The file is opened for reading only.

    For example:

      airpeft privacy ledger runs/quick/ledger.sqlite --epsilon 8

      airpeft privacy ledger runs/quick/ledger.sqlite --client client-00003 --format json

    Exit codes: 0 the chain holds; 1 the ledger was edited or damaged; 2 bad input.
    """
    with _plain_errors("ledger"):
        from privacy.budget import Accountant
        from privacy.ledger_report import report

        found = report(
            path,
            client=client,
            delta=delta,
            epsilon=epsilon,
            accountant=Accountant(accountant.value),
        )
    _show("ledger", found.to_mapping(), format, lambda: _print_ledger(found))


@contextmanager
def _plain_errors(command: str) -> Iterator[None]:
    from privacy.errors import PrivacyError

    try:
        yield
    except PrivacyError as error:
        from privacy.ledger import LedgerEdited

        typer.echo(f"airpeft privacy {command}: {error}", err=True)
        code = EDITED if isinstance(error, LedgerEdited) else BAD_INPUT
        raise typer.Exit(code) from None


def _show(kind: str, data: Any, format: Format, people: Callable[[], None]) -> None:  # noqa: A002
    if format is Format.JSON:
        document = {"schema": f"airpeft.v1.privacy-{kind}", "data": data}
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        people()


Beside = Mapping[str, float | None]


def _plan_document(plan: Plan, answer: Answer, beside: Beside) -> dict[str, Any]:
    return {
        "epsilon": _finite(answer.epsilon),  # null: no bound
        "delta": plan.delta,
        "noise_multiplier": answer.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps * plan.rounds,
        "rounds": plan.rounds,
        "steps_per_round": plan.steps,
        "epsilon_by_accountant": {
            name: None if value is None else _finite(value) for name, value in beside.items()
        },
        "epsilon_by_round": [
            {"round": number, "steps": number * plan.steps, "epsilon": _finite(value)}
            for number, value in answer.by_round
        ],
        "budget": plan.epsilon,
        "rounds_within_budget": answer.rounds_within,
        "examples": plan.examples,
        "accountant": plan.accountant.value,
        "unit": plan.unit.value,
    }


def _print_plan(plan: Plan, answer: Answer, beside: Beside) -> None:
    total = plan.steps * plan.rounds
    if math.isinf(answer.epsilon):
        typer.echo("epsilon           no bound: without noise nothing is private")
    else:
        typer.echo(f"epsilon           {answer.epsilon:.4f} at delta {plan.delta:g}")
    typer.echo(f"noise multiplier  {answer.noise_multiplier:g}")
    split = f" ({plan.rounds} rounds of {plan.steps})" if plan.rounds > 1 else ""
    of_what = "rows" if plan.unit.value == "example" else "clients"
    typer.echo(
        f"steps             {total}{split}, each with {plan.sample_rate:.3%} of the {of_what}"
    )
    typer.echo(
        f"accountant        {plan.accountant.value}, for one {plan.unit.value} added or removed"
    )
    others = [
        f"{name} {value:.4f}"
        for name, value in beside.items()
        if name != plan.accountant.value and value is not None and math.isfinite(value)
    ]
    if others:
        typer.echo(f"the same noise by {', '.join(others)}")
    if plan.noise_multiplier is not None and answer.rounds_within is not None:
        typer.echo(
            f"rounds            epsilon {plan.epsilon:g} pays for {_many(answer.rounds_within)} "
            f"of {plan.steps} steps"
        )
        if answer.rounds_within < plan.rounds:
            typer.echo(
                f"                  this plan has {plan.rounds}: use more noise, fewer rounds or "
                "steps, or a smaller sample rate"
            )
    if plan.rounds > 1:
        from privacy.tables import table

        typer.echo("")
        rows = [
            (str(n), f"{n * plan.steps}", "no bound" if math.isinf(e) else f"{e:.4f}")
            for n, e in answer.by_round
        ]
        typer.echo(table(("round", "steps", "epsilon"), rows))


def _print_ledger(report: Report) -> None:
    from privacy.tables import table

    typer.echo(
        f"{report.path}: the chain of hashes holds: {report.events} events, head {report.head[:16]}"
    )
    if not report.rows:
        typer.echo("Nobody has spent anything yet.")
        return
    budget = report.budget is not None
    names = ["client", "runs", "rounds", "events", f"epsilon at {report.delta:g}", "last noise"]
    rows = []
    for row in report.rows:
        cells = [row.client, str(row.runs), str(row.rounds), str(row.events)]
        cells.append("no bound" if math.isinf(row.epsilon) else f"{row.epsilon:.4f}")
        cells.append(f"{row.last.noise_multiplier:g}")
        if row.budget_left is not None and row.rounds_left is not None:
            cells += [f"{row.budget_left:.4f}", _many(row.rounds_left)]
        rows.append(cells)
    typer.echo("")
    typer.echo(table([*names, *(("budget left", "rounds left") if budget else ())], rows))
    typer.echo("")
    typer.echo(
        f"Epsilon by {report.accountant.value}, over all runs, for one {report.unit.value} added "
        "or removed."
    )
    if report.accountant.value == "rdp" and any(row.budget_left == 0 for row in report.rows):
        typer.echo(
            "rdp is a bound some 12 % above the tight one: where a run counts by pld, look with "
            "--accountant pld."
        )
    if not budget:
        typer.echo("With --epsilon E, a client's budget: what is left of it.")


def _many(rounds: int) -> str:
    from privacy.planning import MOST_ROUNDS

    return f"{rounds} or more rounds" if rounds >= MOST_ROUNDS else f"{rounds} rounds"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
