"""``airpeft privacy``: what training will cost, what it has cost, and what an adapter promises.

Tables and sentences are for people; ``--format json`` prints ``{"schema": "airpeft.v1.privacy-...",
"data": ...}``. Exit codes: 0 done; 1 a ledger that was edited or damaged; 2 bad input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregation.output import AsFormat, Format, envelope

EDITED, BAD_INPUT = 1, 2

privacy = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Plan a privacy budget, explain a statement, read a ledger, audit a mechanism.",
    epilog="For example: airpeft privacy plan --epsilon 8 --sample-rate 0.1 --steps 100 "
    "--delta 1e-5",
)


class AccountantName(StrEnum):
    """The accountants, by name; the numbers come from ``privacy.calibration``."""

    RDP = "rdp"
    PLD = "pld"


class UnitName(StrEnum):
    """What neighbouring data sets differ in, by name."""

    EXAMPLE = "example"
    CLIENT = "client"


class NoiseName(StrEnum):
    """Who adds the noise on the sum of clients' updates."""

    GAUSSIAN = "gaussian"
    DISTRIBUTED = "distributed"


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
    mechanism: Annotated[
        NoiseName, typer.Option(help="Of a client's unit; distributed: clients add the noise.")
    ] = NoiseName.GAUSSIAN,
    clients: Annotated[
        int | None, typer.Option(help="That a round asks; with --mechanism distributed.")
    ] = None,
    dropouts: Annotated[float, typer.Option(help="Share of them that may drop out.")] = 0.3,
    corrupt: Annotated[float, typer.Option(help="Share that may help the server.")] = 0.1,
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

      airpeft privacy plan --unit client --mechanism distributed --clients 50 --sample-rate 1
      --epsilon 8 --rounds 10 --delta 1e-3
    """
    with _plain_errors("plan"):
        from privacy.budget import Accountant, BudgetError, Unit
        from privacy.cli_text import plan_document, plan_lines
        from privacy.plan_shares import Shares
        from privacy.planning import Plan, by_accountant

        if steps is None and unit is UnitName.EXAMPLE:
            raise BudgetError("--steps is missing: the steps of training, of each round")
        shared = mechanism is NoiseName.DISTRIBUTED
        if (clients is None) is shared:
            raise BudgetError("--clients and --mechanism distributed go together: give both")
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
            shares=Shares(clients=clients or 0, dropouts=dropouts, corrupt=corrupt)
            if shared
            else None,
        )
        answer = asked.answer()
        beside = {
            name.value: value
            for name, value in by_accountant(asked, answer.noise_multiplier).items()
        }
    document = plan_document(asked, answer, beside)
    _show("plan", document, format, lambda: plan_lines(asked, answer, beside))


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
    _show("statement", data, format, sentences.splitlines)


@privacy.command()
def ledger(
    path: Annotated[Path, typer.Argument(help="The file: ledger.sqlite of a run or a device.")],
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="At this delta; else at that of the client's last run.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="A client's budget; else that of its last run.")
    ] = None,
    accountant: Annotated[
        AccountantName | None, typer.Option(help="rdp or pld; else that of the client's last run.")
    ] = None,
    format: AsFormat = Format.TABLE,  # noqa: A002 - the name of the option
) -> None:
    """Who has spent what, over all runs; the chain of hashes is verified first.

    Rounds left are rounds like the client's last one, within the budget that its run may reach.
    The file is opened for reading only.

    For example:

      airpeft privacy ledger runs/quick/ledger.sqlite

      airpeft privacy ledger runs/quick/ledger.sqlite --epsilon 20 --delta 1e-6

      airpeft privacy ledger runs/quick/ledger.sqlite --client client-00003 --format json

    Exit codes: 0 the chain holds; 1 the ledger was edited or damaged; 2 bad input.
    """
    with _plain_errors("ledger"):
        from privacy.budget import Accountant
        from privacy.cli_text import ledger_lines
        from privacy.ledger_report import report

        found = report(
            path,
            client=client,
            delta=delta,
            epsilon=epsilon,
            accountant=None if accountant is None else Accountant(accountant.value),
        )
    _show("ledger", found.to_mapping(), format, lambda: ledger_lines(found))


@privacy.command()
def limit(
    path: Annotated[Path, typer.Argument(help="The file: ledger.sqlite; made if it is missing.")],
    epsilon: Annotated[
        float | None, typer.Option(help="The most that may be spent, over all runs, for ever.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Below 1 over the number of examples.")] = 1e-5,
    client: Annotated[
        str, typer.Option(help="Of this client; * for every one without a limit of its own.")
    ] = "*",
    accountant: ByAccountant = AccountantName.RDP,
    lift: Annotated[bool, typer.Option("--lift", help="Take the limit back.")] = False,
) -> None:
    """The most that a client spends, whoever asks: it refuses by its own ledger.

    A run brings a budget of its own, which the server chooses. This one is the data's owner's: an
    event that would pass it is refused before the first step, and so is what has no bound: training
    without privacy, and measuring on the client's own rows for somebody else. It stands in the
    chain of the ledger, so it cannot be changed unseen.

    For example:

      airpeft privacy limit device/ledger.sqlite --epsilon 8 --delta 1e-6

      airpeft privacy limit device/ledger.sqlite --lift
    """
    with _plain_errors("limit"):
        from privacy.budget import Accountant, BudgetError
        from privacy.ledger import Ledger, Terms
        from privacy.planning import check_delta, check_epsilon

        if (epsilon is None) != lift:
            raise BudgetError("give either --epsilon, the limit, or --lift, which takes it back")
        terms = None
        if epsilon is not None:
            check_epsilon(epsilon)
            check_delta(delta)
            terms = Terms(delta=delta, epsilon=epsilon, accountant=Accountant(accountant.value))
        opened = Ledger(path)
        try:
            opened.set_limit(terms, client)
        finally:
            opened.close()
    who = "every client" if client == "*" else client
    if epsilon is None:
        typer.echo(f"{path}: {who} has no limit any more")
    else:
        typer.echo(f"{path}: {who} spends at most epsilon {epsilon:g} at delta {delta:g}")


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


def _show(
    kind: str,
    data: Any,
    format: Format,  # noqa: A002 - the name of the option
    people: Callable[[], Iterable[str]],
) -> None:
    if format is Format.JSON:
        typer.echo(json.dumps(envelope(f"privacy-{kind}", data), indent=1, allow_nan=False))
    else:
        for line in people():
            typer.echo(line)
