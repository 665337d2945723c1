"""A ledger on one screen: what each client has spent, and what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.budget import Accountant, BudgetError, Unit
from privacy.calibration import epsilon as epsilon_of
from privacy.events import Event
from privacy.ledger import Entry, Ledger
from privacy.planning import check_accountant, check_delta, check_epsilon, rounds_left


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one client has spent.

    Attributes:
        client: its name.
        runs: in how many runs it took part.
        rounds: how many rounds of them.
        events: entries of the ledger; above ``rounds`` where a round was trained on other inputs.
        steps: of all events.
        epsilon: of all events; infinity if one had no noise.
        last: the latest event that cost anything.
        budget_left: budget minus epsilon, at least 0; None without a budget.
        rounds_left: how often ``last`` may be repeated; None without a budget.
    """

    client: str
    runs: int
    rounds: int
    events: int
    steps: int
    epsilon: float
    last: Event
    budget_left: float | None
    rounds_left: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A ledger whose chain of hashes was verified.

    Attributes:
        path: the file.
        events: how many the chain has, of all clients.
        head: hash of the last one, hexadecimal.
        delta: at which epsilon was computed.
        budget: epsilon that each client may spend, or None.
        accountant: how events were composed.
        rows: by client's name.
    """

    path: Path
    events: int
    head: str
    delta: float
    budget: float | None
    accountant: Accountant
    rows: tuple[Row, ...]

    @property
    def unit(self) -> Unit:
        """What was spent on: examples of each client, or on clients, by the server."""
        return self.rows[0].last.unit if self.rows else Unit.EXAMPLE

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON; an epsilon without bound is None."""
        return {
            "path": str(self.path),
            "verified": True,
            "events": self.events,
            "head": self.head,
            "delta": self.delta,
            "budget": self.budget,
            "accountant": self.accountant.value,
            "unit": self.unit.value,
            "clients": [
                {
                    "client": row.client,
                    "runs": row.runs,
                    "rounds": row.rounds,
                    "events": row.events,
                    "steps": row.steps,
                    "epsilon": row.epsilon if math.isfinite(row.epsilon) else None,
                    "last_event": row.last.to_mapping(),
                    "budget_left": row.budget_left,
                    "rounds_left": row.rounds_left,
                }
                for row in self.rows
            ],
        }


def report(
    path: Path,
    *,
    client: str | None = None,
    delta: float,
    epsilon: float | None = None,
    accountant: Accountant = Accountant.RDP,
) -> Report:
    """Read a ledger, verify its chain, and add up what each client has spent.

    Args:
        path: the ledger's file; it is not changed.
        client: only this one.
        delta: above 0 and below 1.
        epsilon: what each client may spend over all runs, or None.
        accountant: how events are composed.

    Raises:
        BudgetError: if delta or epsilon is out of bounds, or the client is not in the ledger.
        LedgerEdited: if the chain does not hold.
        LedgerError: if the file is not a ledger.
    """
    check_delta(delta)
    if epsilon is not None:
        check_epsilon(epsilon)
    ledger = Ledger(path, read_only=True)
    try:
        head, entries = ledger.verify(), ledger.table()
    finally:
        ledger.close()
    # Only what was verified counts: another process may have appended in between.
    by_client: dict[str, list[Entry]] = {}
    for entry in entries[: head.count]:
        by_client.setdefault(entry.client, []).append(entry)
    if client is not None and client not in by_client:
        known = ", ".join(sorted(by_client)[:10]) or "nobody"
        raise BudgetError(f"--client {client} has spent nothing in {path}; in it: {known}")
    names = sorted(by_client) if client is None else [client]
    return Report(
        path=path,
        events=head.count,
        head=head.hash,
        delta=delta,
        budget=epsilon,
        accountant=accountant,
        rows=tuple(_row(name, by_client[name], delta, epsilon, accountant) for name in names),
    )


def _row(
    client: str,
    entries: Sequence[Entry],
    delta: float,
    budget: float | None,
    accountant: Accountant,
) -> Row:
    events = [entry.event for entry in entries]
    check_accountant(events, delta, accountant, budget=budget)
    spent = epsilon_of(events, delta, accountant)
    last = next((event for event in reversed(events) if event.steps), events[-1])
    return Row(
        client=client,
        runs=len({entry.run for entry in entries}),
        rounds=len({(entry.run, entry.round) for entry in entries}),
        events=len(events),
        steps=sum(event.steps for event in events),
        epsilon=spent,
        last=last,
        budget_left=None if budget is None else max(0.0, budget - spent),
        rounds_left=None
        if budget is None
        else rounds_left(events, last, budget, delta, accountant),
    )
