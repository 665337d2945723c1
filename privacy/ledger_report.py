"""A ledger on one screen: what each client has spent, and what is left.

Each client's figures are by the terms that stand in the ledger with its last event: the delta and
the accountant that its run counted by, and the budget that the run may reach. Whoever asks may give
others. Where the ledger's owner has set a limit, that one counts too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from privacy.budget import Accountant, BudgetError, Unit
from privacy.calibration import epsilon as epsilon_of
from privacy.events import Event
from privacy.ledger import Entry, Ledger, Terms
from privacy.planning import check_accountant, check_delta, check_epsilon, rounds_left

DELTA = 1e-5  # for ledgers that do not say


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one client has spent.

    Attributes:
        client: its name.
        runs: in how many runs it took part.
        models: how many different ones it trained.
        rounds: how many rounds of the runs.
        events: entries of the ledger; above ``rounds`` where a round was trained on other inputs.
        steps: of all events.
        terms: delta and accountant of these figures, and the budget, if there is one.
        limit: what the ledger's owner allows at most, if anything was set.
        epsilon: of all events; infinity if one had no noise.
        last: the latest event that cost anything.
        budget_left: budget minus epsilon, at least 0; None without a budget.
        rounds_left: how often ``last`` may be repeated within budget and limit; None without both.
    """

    client: str
    runs: int
    models: int
    rounds: int
    events: int
    steps: int
    terms: Terms
    limit: Terms | None
    epsilon: float
    last: Event
    budget_left: float | None
    rounds_left: int | None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON; an epsilon without bound is None."""
        return {
            "client": self.client,
            "runs": self.runs,
            "models": self.models,
            "rounds": self.rounds,
            "events": self.events,
            "steps": self.steps,
            "delta": self.terms.delta,
            "accountant": self.terms.accountant.value,
            "budget": self.terms.epsilon,
            "limit": self.limit.epsilon if self.limit else None,
            "unit": self.last.unit.value,
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "last_event": self.last.to_mapping(),
            "budget_left": self.budget_left,
            "rounds_left": self.rounds_left,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A ledger whose chain of hashes was verified.

    Attributes:
        path: the file.
        events: how many rows the chain has, of all clients, limits included.
        head: hash of the last one, hexadecimal.
        asked: what was asked for instead of the ledger's own terms: delta, epsilon, accountant.
        rows: by client's name.
    """

    path: Path
    events: int
    head: str
    asked: tuple[float | None, float | None, Accountant | None]
    rows: tuple[Row, ...]

    @property
    def unit(self) -> Unit:
        """What was spent on: examples of each client, or on clients, by the server."""
        return self.rows[0].last.unit if self.rows else Unit.EXAMPLE

    @property
    def common(self) -> Terms | None:
        """Delta, budget and accountant, if they are the same for all."""
        found = {replace(row.terms, model="") for row in self.rows}
        if found:
            return found.pop() if len(found) == 1 else None
        delta, epsilon, accountant = self.asked
        return Terms(delta=delta or DELTA, epsilon=epsilon, accountant=accountant or Accountant.RDP)

    @property
    def median(self) -> float:
        """The median client's epsilon; 0 if there is nobody."""
        return median(row.epsilon for row in self.rows) if self.rows else 0.0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON; delta, budget and accountant are None where clients differ."""
        common = self.common
        return {
            "path": str(self.path),
            "verified": True,
            "events": self.events,
            "head": self.head,
            "delta": common.delta if common else None,
            "budget": common.epsilon if common else None,
            "accountant": common.accountant.value if common else None,
            "unit": self.unit.value,
            "clients": [row.to_mapping() for row in self.rows],
        }


def report(
    path: Path,
    *,
    client: str | None = None,
    delta: float | None = None,
    epsilon: float | None = None,
    accountant: Accountant | None = None,
) -> Report:
    """Read a ledger, verify its chain, and add up what each client has spent.

    Args:
        path: the ledger's file; it is not changed.
        client: only this one.
        delta: above 0 and below 1; None for that of each client's last run.
        epsilon: what each client may spend over all runs; None for what its last run may reach.
        accountant: how events are composed; None for how its last run did.

    Raises:
        BudgetError: if delta or epsilon is out of bounds, or the client is not in the ledger.
        LedgerEdited: if the chain does not hold.
        LedgerError: if the file is not a ledger.
    """
    if delta is not None:
        check_delta(delta)
    if epsilon is not None:
        check_epsilon(epsilon)
    asked = (delta, epsilon, accountant)
    ledger = Ledger(path, read_only=True)
    try:
        head, entries = ledger.verify(), ledger.table()
        by_client: dict[str, list[Entry]] = {}
        for entry in entries:
            # Only what was verified counts: another process may have appended in between.
            if entry.number <= head.count:
                by_client.setdefault(entry.client, []).append(entry)
        if client is not None and client not in by_client:
            known = ", ".join(sorted(by_client)[:10]) or "nobody"
            raise BudgetError(f"--client {client} has spent nothing in {path}; in it: {known}")
        names = sorted(by_client) if client is None else [client]
        limits = {name: ledger.limit(name) for name in names}
    finally:
        ledger.close()
    found = tuple(_row(name, by_client[name], asked, limits[name]) for name in names)
    return Report(path=path, events=head.count, head=head.hash, asked=asked, rows=found)


def _row(
    client: str,
    entries: Sequence[Entry],
    asked: tuple[float | None, float | None, Accountant | None],
    limit: Terms | None,
) -> Row:
    events = [entry.event for entry in entries]
    terms = _terms(entries, events, asked)
    spent = epsilon_of(events, terms.delta, terms.accountant)
    last = next((event for event in reversed(events) if event.steps), events[-1])
    left = [
        rounds_left(events, last, bound.epsilon, bound.delta, bound.accountant)
        for bound in (terms, limit)
        if bound is not None and bound.epsilon is not None
    ]
    return Row(
        client=client,
        runs=len({entry.run for entry in entries}),
        models=len({entry.terms.model if entry.terms else "" for entry in entries}),
        rounds=len({(entry.run, entry.round) for entry in entries}),
        events=len(events),
        steps=sum(event.steps for event in events),
        terms=terms,
        limit=limit,
        epsilon=spent,
        last=last,
        budget_left=None if terms.epsilon is None else max(0.0, terms.epsilon - spent),
        rounds_left=min(left, default=None),
    )


def _terms(
    entries: Sequence[Entry],
    events: Sequence[Event],
    asked: tuple[float | None, float | None, Accountant | None],
) -> Terms:
    """What to count by: as asked, else as the client's last run did, else the defaults."""
    delta, epsilon, accountant = asked
    own = next((e.terms for e in reversed(entries) if e.terms is not None), Terms(delta=DELTA))
    budget = own.epsilon if epsilon is None else epsilon
    chosen = Terms(
        delta=delta or own.delta, epsilon=budget, accountant=accountant or own.accountant
    )
    try:
        check_accountant(events, chosen.delta, chosen.accountant, budget=budget)
    except BudgetError:
        if accountant is not None:
            raise
        return replace(chosen, accountant=Accountant.RDP)
    return chosen
