"""A finished simulation, so that what it promises can be audited.

The plan, the rows, the recipe and the privacy settings are those of the run folder; the number of
a client's rounds is the ledger's; the claim is what ``privacy.json`` says beside the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from aggregation.assignment import Assignment
from aggregation.errors import AggregationError
from aggregation.state import initial_state
from clients.data import held_out
from clients.errors import ClientError
from clients.spending import private_event
from clients.training import TrainingPlan
from federation.handing_out import HandingOut
from privacy.budget import LocalPrivacy
from privacy.central import CentralPrivacy
from privacy.ledger_report import Row, report
from privacy.statement import StatementError
from privacy.statement import read as read_statement
from simulations import datasets, folder
from simulations.auditing import LocalSubject
from simulations.auditing_central import CentralSubject
from simulations.folder import Run, RunError
from simulations.scenario import load


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What a run promises, and what it promises it of.

    Attributes:
        subject: one client's training, or the server's sums.
        claimed: epsilon.
        delta: at which.
        source: who says so.
    """

    subject: LocalSubject | CentralSubject
    claimed: float
    delta: float
    source: str


def of_run(
    out: Path, *, mechanism: str = "local", client: str | None = None, delta: float | None = None
) -> Audited:
    """What a finished run promises.

    Args:
        out: the run folder.
        mechanism: ``local`` for what it promises to examples, ``central`` to clients.
        client: whose training, if local; None for the one that has spent most.
        delta: audit at this delta, against the epsilon that the events come to; None for the claim
            in ``privacy.json``.

    Raises:
        RunError: if the folder holds no run, or one without a claim.
        StatementError: if the run has left no adapter.
        BudgetError: if the client has spent nothing.
        LedgerError: if the ledger is not there or was edited.
        AuditError: if the server's noise is of a kind that no canary tells of.
        SimulationError: if the base or the data are not there any more.
    """
    if not (out / folder.RESOLVED).is_file():
        raise RunError(
            f"{out}: holds no run: give the folder of a finished simulation, such as runs/quick"
        )
    with folder.locked(out) as where:
        run = folder.prepare(load(where / folder.RESOLVED), where)
    local, central = run.privacy, run.config.client_privacy
    if (local if mechanism == "local" else central) is None:
        other = central if mechanism == "local" else local
        section = "[privacy]" if mechanism == "local" else "[client_privacy]"
        remedy = (
            f"give a run whose scenario has a {section} section"
            if other is None
            else f"audit it with --mechanism {'central' if mechanism == 'local' else 'local'}"
        )
        raise RunError(f"{out}: without {section}, this run makes no such claim: {remedy}")
    said = read_statement(run.out / folder.ADAPTER)["example" if mechanism == "local" else "client"]
    if said is None or said["epsilon"] is None:
        raise StatementError(f"{out}: the statement of this run promises no epsilon to audit")
    at = float(said["delta"]) if delta is None else delta
    try:
        if local is not None and mechanism == "local":
            row = _row(run, local, client, at)
            subject: LocalSubject | CentralSubject = _training(run, local, row)
            counted, source = row.epsilon, "the run's ledger"
        else:
            assert central is not None  # noqa: S101 - checked before
            subject = _sums(run, central)
            known = replace(central.calibrated(), delta=at, epsilon=None)
            counted, source = known.epsilon_after(central.rounds), "the run's settings"
    except (AggregationError, ClientError) as error:
        raise RunError(f"{out}: {error}") from error
    if delta is None:
        return Audited(
            subject=subject, claimed=float(said["epsilon"]), delta=at, source="privacy.json"
        )
    return Audited(subject=subject, claimed=counted, delta=at, source=source)


def _row(run: Run, privacy: LocalPrivacy, client: str | None, delta: float) -> Row:
    """What the client has spent in the run."""
    rows = report(run.ledger, client=client, delta=delta, accountant=privacy.accountant).rows
    if not rows:
        raise RunError(f"{run.out}: nobody has trained in this run yet: finish it first")
    return max(rows, key=lambda row: row.epsilon)


def _training(run: Run, privacy: LocalPrivacy, row: Row) -> LocalSubject:
    """A client's training, round after round."""
    partitions = run.out / folder.PARTITIONS
    rows = datasets.read(partitions / f"{row.client}.jsonl", run.summary["labels"])
    examples, _ = held_out(rows, row.client, run.config.holdout)
    plan = TrainingPlan.from_mapping(run.config.plan)
    handing = HandingOut(run.config, run.config.chosen())
    state = initial_state(run.initial)
    handing.begin(state, 1)
    start = handing.adapter(row.client)

    def assignment(number: int) -> Assignment:
        handing.begin(state, number)
        return handing.assignment(row.client)

    return LocalSubject(
        base=run.base,
        start=start,
        examples=examples,
        plan=plan,
        privacy=privacy,
        round=private_event(plan, privacy, len(examples)),
        rounds=row.rounds,
        client=row.client,
        assignment=assignment,
    )


def _sums(run: Run, central: CentralPrivacy) -> CentralSubject:
    """The server's sums of what clients send; in every round what they send in the first."""
    return CentralSubject(
        central=central,
        start=run.initial,
        assignment=run.config.chosen().assignment(1, run.initial.spec),
    )
