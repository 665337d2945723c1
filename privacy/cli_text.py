"""What ``airpeft privacy`` prints for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privacy.budget import Accountant
from privacy.planning import MOST_ROUNDS, Answer, Plan
from privacy.tables import table

if TYPE_CHECKING:  # it loads the database's library, which a plan does not need
    from privacy.ledger_report import Report, Row

MOST_ROWS = 30  # of clients on one screen


def plan_document(plan: Plan, answer: Answer, beside: Mapping[str, float | None]) -> dict[str, Any]:
    """A plan for programs; arguments as for :func:`plan_lines`."""
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
        **({"shares": plan.shares.document(answer.noise_multiplier)} if plan.shares else {}),
    }


def plan_lines(plan: Plan, answer: Answer, beside: Mapping[str, float | None]) -> Iterator[str]:
    """What a plan comes to.

    Args:
        plan: what was asked.
        answer: what it comes to.
        beside: epsilon of the same noise by every accountant.
    """
    total = plan.steps * plan.rounds
    if math.isinf(answer.epsilon):
        yield ("epsilon           no bound: without noise nothing is private")
    else:
        yield (f"epsilon           {answer.epsilon:.4f} at delta {plan.delta:g}")
    yield (f"noise multiplier  {answer.noise_multiplier:g}")
    if plan.shares:
        yield from plan.shares.lines(answer.noise_multiplier)
    split = f" ({plan.rounds} rounds of {plan.steps})" if plan.rounds > 1 else ""
    of_what = "rows" if plan.unit.value == "example" else "clients"
    yield (f"steps             {total}{split}, each with {plan.sample_rate:.3%} of the {of_what}")
    neighbours = "'s updates, or zeros in their place" if plan.shares else " added or removed"
    yield (f"accountant        {plan.accountant.value}, for one {plan.unit.value}{neighbours}")
    others = [
        f"{name} {value:.4f}"
        for name, value in beside.items()
        if name != plan.accountant.value and value is not None and math.isfinite(value)
    ]
    if others:
        yield (f"the same noise by {', '.join(others)}")
    if plan.noise_multiplier is not None and answer.rounds_within is not None:
        yield (
            f"rounds            epsilon {plan.epsilon:g} pays for {_many(answer.rounds_within)} "
            f"of {plan.steps} steps"
        )
        if answer.rounds_within < plan.rounds:
            yield (
                f"                  this plan has {plan.rounds}: use more noise, fewer rounds or "
                "steps, or a smaller sample rate"
            )
    if plan.rounds > 1:
        yield ("")
        rows = [
            (str(n), f"{n * plan.steps}", "no bound" if math.isinf(e) else f"{e:.4f}")
            for n, e in answer.by_round
        ]
        yield (table(("round", "steps", "epsilon"), rows))


def ledger_lines(report: Report) -> Iterator[str]:
    """A ledger on one screen: of many clients, those that have spent most."""
    yield (
        f"{report.path}: the chain of hashes holds: {report.events} events, head {report.head[:16]}"
    )
    if not report.rows:
        yield "Nobody has spent anything yet."
        return
    rows: Sequence[Row] = report.rows
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: -row.epsilon)[:MOST_ROWS]
    yield ""
    yield _table(rows, differ=report.common is None)
    yield ""
    if len(rows) < len(report.rows):
        yield (
            f"These {len(rows)} of {len(report.rows)} clients have spent most; all of them are in "
            "--format json."
        )
    yield from _summary(report)


def _table(rows: Sequence[Row], *, differ: bool) -> str:
    bounded = any(row.rounds_left is not None for row in rows)
    columns = {
        "client": [row.client for row in rows],
        "runs": [str(row.runs) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        "events": [str(row.events) for row in rows],
        "epsilon": [_epsilon(row.epsilon) for row in rows],
    }
    if differ:
        columns["delta"] = [f"{row.terms.delta:g}" for row in rows]
        columns["by"] = [row.terms.accountant.value for row in rows]
    if bounded:
        columns["budget"] = [_given(row.terms.epsilon) for row in rows]
        columns["budget left"] = [_given(row.budget_left) for row in rows]
        if any(row.limit for row in rows):
            columns["limit"] = [_given(row.limit.epsilon if row.limit else None) for row in rows]
    columns["last noise"] = [f"{row.last.noise_multiplier:.4g}" for row in rows]
    if bounded:
        columns["rounds left"] = [_left(row.rounds_left) for row in rows]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _summary(report: Report) -> Iterator[str]:
    rows, common = report.rows, report.common
    if len(rows) > 1:
        worst = max(row.epsilon for row in rows)
        yield (
            f"{len(rows)} clients: epsilon up to {_epsilon(worst)}, {_epsilon(report.median)} in "
            "the middle."
        )
    how = f"at delta {common.delta:g} by {common.accountant.value}, " if common else ""
    yield (
        f"Epsilon is {how}over all runs and models, for one {report.unit.value} added or removed."
    )
    left = [row.rounds_left for row in rows if row.rounds_left is not None]
    if not left:
        yield "With --epsilon E, a client's budget: what is left of it."
        return
    least, most = _left(min(left)), _left(max(left))
    yield (
        f"Rounds left: {least if least == most else f'{least} to {most}'}, each with the noise, "
        "rate and steps of the client's last one."
    )
    loose = [r for r in rows if r.budget_left == 0 and r.terms.accountant is Accountant.RDP]
    if loose:
        yield (
            "rdp is a bound some 12 % above the tight one: a run that counts by pld has more left "
            "(--accountant pld)."
        )


def _epsilon(value: float) -> str:
    return "no bound" if math.isinf(value) else f"{value:.4f}"


def _given(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _left(rounds: int | None) -> str:
    if rounds is None:
        return "-"
    return f"{rounds} or more" if rounds >= MOST_ROUNDS else str(rounds)


def _many(rounds: int) -> str:
    return f"{rounds} or more rounds" if rounds >= MOST_ROUNDS else f"{rounds} rounds"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
